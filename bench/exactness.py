"""How far log p and its gradients are from float64, ours and torch's class: `python -m bench.exactness`.

Prints the table of `docs/exactness.md`, in some seconds. Each row has another kind of P; inputs come from a generator
with a fixed seed, and float64 is torch's class on the same numbers. `tests/test_lowrank_oracle.py` has bounds at this
size.
"""

import argparse
import math
import sys
from typing import Any

import torch
from torch.distributions import LowRankMultivariateNormal as Textbook

from lowrank_mvn import LowRankMultivariateNormal

from .tables import markdown

__all__ = ["CLASSES", "KINDS", "errors", "table"]

B, N, R, D = 2, 218 * 178 * 3, 25, 1e-5
KINDS = {"independent": 1.0, "nearly collinear, 1 : 1e-2": 1e-2, "nearly collinear, 1 : 1e-4": 1e-4}
CLASSES: dict[str, Any] = {"torch": Textbook, "ours": LowRankMultivariateNormal}


def _inputs(ratio: float, n: int) -> dict[str, torch.Tensor]:
    """P [B, n, R], loc, d and a sample x [B, n] of that distribution, in float32.

    `ratio` is of what the columns do not share to what they do; 1 where they share nothing.
    """
    g = torch.Generator().manual_seed(11)
    P = 0.2 * torch.randn(B, n, R, generator=g)
    if ratio != 1:
        P[..., 1:] = P[..., :1] + ratio * P[..., 1:]
    loc = torch.rand(B, n, generator=g)
    omega_p = torch.randn(B, R, 1, generator=g, dtype=torch.float64)
    omega_d = torch.randn(B, n, generator=g, dtype=torch.float64)
    x = (loc + (P.double() @ omega_p)[..., 0] + math.sqrt(D) * omega_d).float()
    return {"P": P, "loc": loc, "d": torch.full((B, n), D), "x": x}


def _results(kind: Any, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """log p [B], and the gradients of Σ(H − log p) in P, loc and d."""
    leaves = {name: inputs[name].to(dtype, copy=True).requires_grad_() for name in ("P", "loc", "d")}
    p = kind(leaves["loc"], leaves["P"], leaves["d"], validate_args=False)
    log_p = p.log_prob(inputs["x"].to(dtype))
    return [log_p.detach(), *torch.autograd.grad((p.entropy() - log_p).sum(), list(leaves.values()))]


def errors(ratio: float, n: int = N) -> dict[str, tuple[float, float] | None]:
    """Of each of `CLASSES`: the largest error of log p (nats) and the largest relative error of a gradient (norms);
    None where it finds its matrix not to be positive definite."""
    inputs = _inputs(ratio, n)
    exact = _results(Textbook, inputs, torch.float64)
    found: dict[str, tuple[float, float] | None] = {}
    for name, kind in CLASSES.items():
        try:
            off = [a.double() - b for a, b in zip(_results(kind, inputs, torch.float32), exact, strict=True)]
        except torch.linalg.LinAlgError:
            found[name] = None
            continue
        gradients = [(e.norm() / b.norm()).item() for e, b in zip(off[1:], exact[1:], strict=True)]
        found[name] = off[0].abs().max().item(), max(gradients)
    return found


def _number(value: float) -> str:
    """Two digits that mean something."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:.0f}" if rounded >= 100 else f"{rounded:g}"


def table(n: int = N) -> str:
    """The table of `docs/exactness.md`."""
    heads = ["columns of P"]
    heads += [f"{what}, {who}" for what in ("log p off by [nats]", "gradients off by") for who in CLASSES]
    rows = []
    for name, ratio in KINDS.items():
        pairs = errors(ratio, n).values()
        cells = [["raises"] * 2 if pair is None else [_number(value) for value in pair] for pair in pairs]
        rows.append([name, *(cell[i] for i in range(2) for cell in cells)])
    return markdown(heads, ["---"] * len(heads), *rows)


def main(args: list[str] | None = None) -> int:
    summary = (__doc__ or "").splitlines()[0]
    argparse.ArgumentParser(prog="python -m bench.exactness", description=summary).parse_args(args)
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
