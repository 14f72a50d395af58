"""Pictures of held-out images: means and samples at their codes."""

from dataclasses import dataclass

from .. import data
from .base import OfRun, parse

USAGE = "RUN [options]"


@dataclass(frozen=True)
class Options(OfRun):
    """Pictures of held-out images: the image, the mean at its code, and samples of p(x|z)."""

    images: int = 8
    """Images, spread over the held-out ones (count)."""
    samples: int = 3
    """Samples below each mean (count)."""


def main(args: list[str]) -> int:
    from ..tools import figures

    o = parse(Options, "reconstruct", args)
    run, vae = o.open()
    x = data.load(run.config.data).first("validation", o.images)
    path = o.out or run.figures / "reconstructions.png"
    print(figures.save_reconstructions({run.config.model.head: vae}, x, path, o.samples))
    return 0
