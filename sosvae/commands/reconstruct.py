"""Pictures of held-out images: means and samples at their codes."""

import dataclasses
from dataclasses import dataclass

from .base import OfSamples, at_least, parse

USAGE = "RUN [options]"


@dataclass(frozen=True)
class Options(OfSamples):
    """Pictures of held-out images: the image, the mean at its code, and samples of p(x|z)."""

    images: int = 8
    """Images, spread over the held-out ones (count)."""
    samples: int = 3
    """Samples below each mean (count)."""
    source: str | None = None
    """Place of the run's images, if they have moved, like --data.source of `sosvae train`."""
    accept_data_changes: bool = False
    """Go on, although images have come, gone or changed since the run was trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, images=self.images)
        at_least(0, samples=self.samples)


def main(args: list[str]) -> int:
    from ..tools import figures

    o = parse(Options, "reconstruct", args)
    run, vae, _ = o.open()
    config = run.config.data
    moved = dataclasses.replace(config, source=config.source if o.source is None else o.source)
    x = run.images(moved, accept_changes=o.accept_data_changes).first("validation", o.images)
    path = o.out or run.figures / "reconstructions.png"
    models = {run.config.model.head: vae}
    print(figures.save_reconstructions(models, x, path, o.samples, o.temperature))
    return 0
