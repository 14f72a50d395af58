"""Pictures at codes from the prior: means and samples."""

from dataclasses import dataclass

import torch

from ..config import check_seed
from .base import OfSamples, at_least, parse

USAGE = "RUN [options]"


@dataclass(frozen=True)
class Options(OfSamples):
    """Pictures at codes from the prior z ~ N(0, I): the mean, and samples of p(x|z)."""

    codes: int = 8
    """Codes, one column each (count)."""
    samples: int = 4
    """Samples below each mean (count)."""
    seed: int = 0
    """Seed of codes and samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, codes=self.codes)
        at_least(0, samples=self.samples)
        check_seed(self.seed)


@torch.no_grad()
def main(args: list[str]) -> int:
    from ..tools import figures

    o = parse(Options, "sample", args)
    run, vae, device = o.open()
    torch.manual_seed(o.seed)
    p = vae.decode(torch.randn(o.codes, vae.latents, device=device))
    rows = [("mean", vae.unflatten(p.loc).cpu())]
    rows += [("sample", vae.unflatten(p.rsample(temperature=o.temperature)).cpu()) for _ in range(o.samples)]
    print(figures.save_images(rows, o.out or run.figures / "samples.png"))
    return 0
