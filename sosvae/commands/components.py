"""One sample with its principal components scaled, one after the other (paper, figures 5, 9 and 10)."""

import math
from dataclasses import dataclass

import torch

from ..config import check_seed
from .base import OfSamples, at_least, parse

USAGE = "RUN [options]"


@dataclass(frozen=True)
class Options(OfSamples):
    """A row for each principal component of PPᵀ, the largest first: one sample with it scaled (equation 5)."""

    components: int = 5
    """Rows (count)."""
    factors: tuple[float, ...] = (-5.0, -3.0, -1.0, 0.0, 1.0, 3.0, 5.0)
    """What a component is scaled by; at 1 the sample is as it was (factor)."""
    seed: int = 0
    """Of code and sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, components=self.components)
        check_seed(self.seed)
        if not self.factors or not all(map(math.isfinite, self.factors)):
            raise ValueError(f"factors is {self.factors}, expected finite numbers")


@torch.no_grad()
def main(args: list[str]) -> int:
    from ..tools import figures, sheets

    o = parse(Options, "components", args)
    run, vae, device = o.open()
    torch.manual_seed(o.seed)
    p, omega_p, omega_d = sheets.drawn(vae.decode(torch.randn(1, vae.latents, device=device)), 1, str(o.run))
    factors = torch.tensor(o.factors, device=device)
    images = sheets.components(p, omega_p[0], omega_d, factors, o.components, o.temperature)
    rows = [(f"component {k + 1}", row) for k, row in enumerate(vae.unflatten(images).cpu())]
    print("scaled by " + ", ".join(f"{factor:g}" for factor in o.factors))
    print(figures.save_images(rows, o.out or run.figures / "components.png"))
    return 0
