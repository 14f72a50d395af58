"""How a normal with a sparse precision is done elsewhere, and the float64 oracle: 3×3, each channel its own stencil."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .operators import Operator
from .peers_torch import Function, _public, _terms

__all__ = ["function"]

Solver = Callable[[Tensor, Tensor, int], Tensor]  # T [N, N], noise [N, S], which image → T⁻ᵀω
OFFSETS = ((0, 1), (1, -1), (1, 0), (1, 1))  # later neighbours, (row, column)


def function(operator: Operator, peer: str) -> Function:
    return _density(operator, peer) if operator.terms else _sample(peer)


# --- log p ----------------------------------------------------------------------------------------------------------


def _density(operator: Operator, peer: str) -> Function:
    if peer == "ours":
        cls, stencil = _public("StencilMultivariateNormal"), _public("Stencil")

        def distribution(loc: Tensor, log_diagonal: Tensor, neighbours: Tensor) -> Any:
            return cls(loc, stencil(log_diagonal, neighbours), validate_args=False)
    else:
        distribution = _Convolution

    def run(x: Tensor, loc: Tensor, log_diagonal: Tensor, neighbours: Tensor) -> dict[str, Tensor]:
        return _terms(operator, distribution(loc, log_diagonal, neighbours), x)

    return run


class _Convolution:
    """As public code of structured uncertainty prediction networks does it: a convolution with one filter for each
    neighbour lays the shifted images side by side, and `einsum` sums them with their weights."""

    def __init__(self, loc: Tensor, log_diagonal: Tensor, neighbours: Tensor) -> None:
        self.loc, self.log_t, self.s = loc, log_diagonal, neighbours
        self.filters = torch.eye(9, dtype=loc.dtype, device=loc.device)[5:].reshape(4, 1, 3, 3)

    def log_prob(self, x: Tensor) -> Tensor:
        delta = (x - self.loc).view_as(self.log_t)
        shifted = nn.functional.conv2d(delta.flatten(0, 1).unsqueeze(1), self.filters, padding=1)
        t = self.log_t.exp()
        weights = (t.unsqueeze(2) * self.s).flatten(0, 1)
        y = t * delta + torch.einsum("bfhw,bfhw->bhw", shifted, weights).view_as(delta)
        half = 0.5 * (x.shape[-1] * math.log(2 * math.pi) + y.square().sum((1, 2, 3)))
        return self.log_t.sum((1, 2, 3)) - half


# --- Samples from given noise ---------------------------------------------------------------------------------------


def _sample(peer: str) -> Function:
    if peer == "ours":
        cls, stencil = _public("StencilMultivariateNormal"), _public("Stencil")

        def run(loc: Tensor, log_diagonal: Tensor, neighbours: Tensor, omega: Tensor) -> dict[str, Tensor]:
            D = cls(loc, stencil(log_diagonal, neighbours), validate_args=False)
            return {"y": D.rsample(omega.shape[:1], noise=(None, omega))}

        return run
    solvers: dict[str, Solver] = {
        "torchsparsegradutils": _triangular,
        "cholespy": _factorised(again=True),
        "cholespy_solve": _factorised(again=False),
        "oracle": lambda T, omega, b: torch.linalg.solve(T.to_dense().mT, omega),
    }
    solve, places = solvers[peer], dict[torch.Size, Any]()

    def sample(loc: Tensor, log_diagonal: Tensor, neighbours: Tensor, omega: Tensor) -> dict[str, Tensor]:
        shape = log_diagonal.shape[1:]
        if shape not in places:  # of the weights in T: the same for all images
            places[shape] = _places(shape)
        found = []
        for b in range(len(loc)):
            T = _sparse(log_diagonal[b], neighbours[b], *places[shape])
            found.append(solve(T, omega[:, b].mT.contiguous(), b).mT + loc[b])
        return {"y": torch.stack(found, 1)}

    return sample


def _places(shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Which weights T has, in its order by rows, and its rows and columns as compressed indices."""
    channels, H, W = shape
    N = channels * H * W
    index = torch.arange(N).view(shape)
    rows, columns, weights = [index.flatten()], [index.flatten()], [index.flatten()]
    for k, (down, right) in enumerate(OFFSETS):
        here = index[:, : H - down, max(0, -right) : W - max(0, right)]
        there = index[:, down:, max(0, right) : W - max(0, -right)]
        rows.append(there.flatten())
        columns.append(here.flatten())
        weights.append(((k + 1) * N + here).flatten())
    row, column, weight = (torch.cat(parts) for parts in (rows, columns, weights))
    order = (row * N + column).argsort()
    starts = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(row, minlength=N).cumsum(0)])
    return weight[order], starts, column[order]


def _sparse(log_t: Tensor, s: Tensor, weight: Tensor, starts: Tensor, column: Tensor) -> Tensor:
    """T of one image, [N, N]."""
    t = log_t.exp()
    values = torch.cat([t.flatten(), (t.unsqueeze(1) * s).transpose(0, 1).flatten()])
    return torch.sparse_csr_tensor(starts, column, values[weight], (t.numel(), t.numel()))


def _triangular(T: Tensor, omega: Tensor, b: int) -> Tensor:
    from torchsparsegradutils import sparse_triangular_solve

    return sparse_triangular_solve(T, omega, upper=False, transpose=True)


def _factorised(again: bool) -> Solver:
    """T⁻ᵀω = Λ⁻¹Tω by a Cholesky factorisation of Λ, which is a part of what is timed only if it is made `again`."""
    kept: dict[tuple[int, int], Any] = {}  # by the number of pixels and the image

    def solve(T: Tensor, omega: Tensor, b: int) -> Tensor:
        key = T.shape[0], b
        if again or key not in kept:
            kept[key] = _factor(T)
        right = (T @ omega).numpy()
        y = torch.empty_like(omega)
        kept[key].solve(right, y.numpy())
        return y

    return solve


def _factor(T: Tensor) -> Any:
    import cholespy

    coo = (T.double() @ T.double().mT.to_sparse_csr()).to_sparse_coo().coalesce()
    row, column = (i.int().numpy() for i in coo.indices())
    kind = cholespy.MatrixType.COO
    return cholespy.CholeskySolverF(T.shape[0], row, column, coo.values().numpy(), kind)
