"""Structured uncertainty for a decoder that exists already, of whatever library."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import devices
from ..config import ModelConfig, TrainingConfig, check_seed
from . import heads
from .observation import Observation

__all__ = ["StructuredUncertainty"]

LEVELS = 255  # steps between black and white
HEAD = ModelConfig(head="global-local", rank=10, head_layers=2)


class StructuredUncertainty(nn.Module):
    """p(x | input) with a head of any kind over a module that stays as it is, and gives a mean and features.

    No gradient goes through the module, and nothing is kept for one: fitting takes the memory of a forward pass.

    Example:
        >>> decoder = lambda z: (z[:, :1], z)  # a mean and features [B, 4, 8, 8] that it is made of
        >>> p = StructuredUncertainty(decoder, torch.rand(2, 4, 8, 8))(torch.rand(3, 4, 8, 8))
        >>> p.rsample((5,)).shape
        torch.Size([5, 3, 64])

    Args:
        module: called with an input it returns a pair, the mean [B, channels, H, W] (intensities from 0 to 1) and
            features [B, K, H, W] (what its last layers make the mean of, for one). A `torch.nn.Module` is in evaluation
            mode while it is called, and afterwards what it was.
        example: an input, from which the sizes are read; one image is enough.
        config: the head and its options (`head`, `rank`, `neighbourhood`, `head_layers`, `fixed_diagonal`, `diagonal`);
            those of the network are of no consequence.

    Raises:
        TypeError: the module returns something else than a pair of tensors.
        ValueError: mean and features of other shapes, or more neighbours than the image has.
    """

    def __init__(self, module: Callable[[Any], Any], example: Any, config: ModelConfig = HEAD) -> None:
        super().__init__()
        self.module = module
        loc, features = self.features(example)
        self.image_shape = torch.Size(loc.shape[1:])
        self.head = heads.find(config.head)(features.shape[1], loc.shape[1], config).to(loc.device)
        del self.head.mean  # the mean is the module's
        self(example)

    @torch.no_grad()
    def features(self, given: Any) -> tuple[Tensor, Tensor]:
        """What the module says to an input: the mean [B, channels, H, W] and the features [B, K, H, W]."""
        with _evaluating(self.module):
            found = self.module(given)
        if not isinstance(found, tuple | list) or len(found) != 2 or not all(isinstance(t, Tensor) for t in found):
            raise TypeError(
                f"module returned {_described(found)}, expected a pair of tensors: the mean [B, channels, H, W] and "
                "features [B, K, H, W]"
            )
        loc, features = found
        if (
            loc.dim() != 4
            or features.dim() != 4
            or (loc.shape[0], loc.shape[2:]) != (features.shape[0], features.shape[2:])
        ):
            raise ValueError(
                f"module returned a mean of shape {list(loc.shape)} and features of shape {list(features.shape)}, "
                "expected [B, channels, H, W] and [B, K, H, W] of the same images"
            )
        return loc, features

    def forward(self, given: Any) -> Observation:
        """p(x | input) over flattened images, batch shape [B], event shape [channels · H · W]."""
        loc, features = self.features(given)
        return self.head.observation(loc.flatten(1), self.head.layers(self.head.prepared(features)))

    def unflatten(self, y: Tensor) -> Tensor:
        """Events [..., N] as images [..., channels, H, W]; a view."""
        return cast(Tensor, y.unflatten(-1, self.image_shape))

    def fit(
        self,
        batches: Iterable[tuple[Any, Tensor]],
        steps: int = 600,
        lr: float = 2e-3,
        seed: int = 0,
        dequantise: bool = True,
    ) -> list[float]:
        """Fits the head to images by log p(x | input), by Adam with a step size that ends at nothing.

        Args:
            batches: pairs of an input and the images [B, channels, H, W], from 0 to 1, that should come out; a
                `DataLoader` for one. It is begun again when it ends.
            steps: of the optimiser (count).
            lr: its step size at first (per step).
            seed: of the noise of dequantisation; the caller's generators are left as they were.
            dequantise: add noise, uniform over one of 255 grey levels, to images that come from bytes: a learned
                variance has no bound otherwise.

        Returns: log p(x | input) of each step, the mean of its batch, in nats per image.

        Raises:
            ValueError: no batches, images of another shape than the mean, or of one value everywhere; or an option out
                of range.
        """
        check_seed(seed)
        settings = TrainingConfig(steps=steps, lr=lr)  # which checks them
        optimizer = torch.optim.Adam(self.head.parameters(), lr=settings.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
        found = list[float]()
        self.head.train()
        with devices.seeded(next(self.head.parameters()).device, seed):
            for given, x in _turns(batches, settings.steps):
                p = self(given)
                if x.shape[1:] != self.image_shape or len(x) != p.batch_shape.numel():
                    expected = [*p.batch_shape, *self.image_shape]
                    raise ValueError(f"images have shape {list(x.shape)}, expected {expected}, as the module's mean")
                x = x.to(p.loc)
                x = x + (torch.rand_like(x) - 0.5) / LEVELS if dequantise else x
                optimizer.zero_grad()
                log_prob = p.log_prob_and_entropy(x.flatten(1))[0].mean()
                (-log_prob / self.image_shape.numel()).backward()
                optimizer.step()
                schedule.step()
                found.append(float(log_prob.detach()))
        self.head.eval()
        return found


def _turns(batches: Iterable[tuple[Any, Tensor]], steps: int) -> Iterator[tuple[Any, Tensor]]:
    """`steps` batches, from the first again after the last."""
    low, high, taken, varies = float("inf"), float("-inf"), 0, False
    while taken < steps:
        before = taken
        for given, x in batches:
            if not varies:
                low, high = min(low, float(x.min())), max(high, float(x.max()))
                varies = low < high
            yield given, x
            taken += 1
            if taken == steps:
                break
        if taken == before:
            raise ValueError("batches is empty, expected pairs of an input and images")
        if not varies:
            raise ValueError(f"images have one value everywhere, {low:g}: expected images that vary")


@contextmanager
def _evaluating(module: object) -> Iterator[None]:
    """In evaluation mode, each part afterwards in its own."""
    parts = list(module.modules()) if isinstance(module, nn.Module) else []
    modes = [part.training for part in parts]
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode


def _described(found: object) -> str:
    if isinstance(found, Tensor):
        return f"one tensor of shape {list(found.shape)}"
    if isinstance(found, tuple | list):
        return f"a {type(found).__name__} of {len(found)} ({', '.join(type(part).__name__ for part in found[:5])})"
    return f"a {type(found).__name__}"
