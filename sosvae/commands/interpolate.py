"""A grid of samples between four, at one code: what the low-rank part can do (paper, figure 4)."""

from dataclasses import dataclass

import torch

from ..config import check_seed
from .base import OfSamples, at_least, parse

USAGE = "RUN [options]"


@dataclass(frozen=True)
class Options(OfSamples):
    """A grid between four samples of one p(x|z): ω_p turns from corner to corner, ω_d is held (equation 4)."""

    side: int = 7
    """Images along an edge (count)."""
    codes: int = 1
    """Codes z ~ N(0, I), one grid each (count)."""
    seed: int = 0
    """Of codes and samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(2, side=self.side)
        at_least(1, codes=self.codes)
        check_seed(self.seed)


@torch.no_grad()
def main(args: list[str]) -> int:
    from ..tools import figures, sheets

    o = parse(Options, "interpolate", args)
    run, vae, device = o.open()
    torch.manual_seed(o.seed)
    rows = []
    for code in range(o.codes):
        p, corners, omega_d = sheets.drawn(vae.decode(torch.randn(1, vae.latents, device=device)), 4, str(o.run))
        images = vae.unflatten(sheets.grid(p, corners, omega_d, o.side, o.temperature)).cpu()
        for i, row in enumerate(images.split(o.side)):
            rows.append((f"code {code + 1}" if i == 0 else "", row))
    print(figures.save_images(rows, o.out or run.figures / "interpolation.png"))
    return 0
