"""Features of images: of those of the data, and of means and samples at codes from the prior."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import devices
from ..models.observation import Temperature
from .bits import Model
from .features import Features, to_bytes
from .ledger import Advanced, Ledger
from .measure import BLOCK

__all__ = ["Generator", "has_global", "of_data"]


def of_data(
    folder: Path,
    digest: str,
    images: Callable[[int, int], NDArray[np.uint8]],
    count: int,
    network: Features,
    advanced: Advanced = lambda count: None,
    batch: int = 32,
) -> Tensor:
    """Features [count, F] of real images, kept in `folder` by their content and what is done to them.

    Args:
        digest: of the images' content, in order.
        images: bytes of images `start` to `stop`.
        batch: images that go through the network at once.
    """

    def make(start: int, stop: int) -> dict[str, NDArray[np.float32]]:
        parts = torch.from_numpy(np.ascontiguousarray(images(start, stop))).split(batch)
        return {"features": torch.cat([network.of(part) for part in parts]).numpy()}

    what = {"images": digest, "features": network.key}
    return torch.from_numpy(Ledger(folder).done(what, count, make, advanced)["features"])


class Generator(NamedTuple):
    """A model whose images are compared with real ones.

    Args:
        model: that makes them.
        key: what its weights are known by.
        ledger: where features are kept.
        batch: images that go through the feature network at once.
    """

    model: Model
    key: str
    ledger: Ledger
    network: Features
    batch: int = 32

    def features(
        self, temperature: Temperature, count: int, seed: int, advanced: Advanced = lambda count: None
    ) -> Tensor:
        """Features [count, F] of samples at codes z ~ N(0, I), one of each; at (0, 0) they are the means.

        Codes are the same at every temperature, and so is the noise.
        """

        def make(start: int, stop: int) -> dict[str, NDArray[np.float32]]:
            images = torch.cat(
                [self.images(first, min(first + BLOCK, stop), temperature, seed) for first in range(start, stop, BLOCK)]
            )
            return {"features": torch.cat([self.network.of(part) for part in images.split(self.batch)]).numpy()}

        what = {"model": self.key, "features": self.network.key, "temperature": list(temperature), "seed": seed}
        return torch.from_numpy(self.ledger.done(what, count, make, advanced)["features"])

    @torch.no_grad()
    def images(self, first: int, stop: int, temperature: Temperature, seed: int) -> Tensor:
        """Samples `first` to `stop` of a block, bytes [·, channels, H, W]."""
        device = self.network.device
        codes = [np.random.default_rng((seed, i, 3)).standard_normal(self.model.latents) for i in range(first, stop)]
        p = self.model.decode(torch.from_numpy(np.stack(codes).astype(np.float32)).to(device))
        with devices.seeded(device, int(np.random.default_rng((seed, first, 4)).integers(2**63))):
            y = p.rsample(temperature=temperature)
        return to_bytes(y.unflatten(-1, self.model.image_shape))


@torch.no_grad()
def has_global(model: Model, device: torch.device) -> bool:
    """Whether samples change with t_P."""
    p = model.decode(torch.zeros(1, model.latents, device=device))
    return not torch.equal(p.rsample(temperature=(1.0, 0.0)), p.loc)
