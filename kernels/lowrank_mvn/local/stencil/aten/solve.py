"""Tᵀy = x by back-substitution, and Ty = x by forward substitution.

On the CPU MKL solves with T as a sparse matrix, row by row for all samples. Without MKL, and elsewhere, all pixels of a
front are solved at once: with T = U diag(t), whose U has a unit diagonal, Uᵀy = x/t, or Uu = x and y = u/t. There the
channels of a pixel are one triangular system I + M of its ties, whose inverse is made for all pixels before.
"""

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ....capacitance import product_dtype
from ..grid import Sizes, channel_pairs, fronts, offsets, pairs


def solve(
    x: Tensor,
    log_diagonal: Tensor,
    neighbours: Tensor,
    ties: Tensor | None,
    spatial: Sizes,
    neighbourhood: Sizes,
    transposed: bool,
) -> Tensor:
    """y [S, B, channels, pixels] with Tᵀy = x, or Ty = x if `transposed`."""
    dtype = product_dtype(x, log_diagonal, neighbours)
    by = by_rows if x.device.type == "cpu" and torch.backends.mkl.is_available() else by_fronts
    t = log_diagonal.to(dtype).exp()
    return by(x.to(dtype), t, neighbours.to(dtype), ties, tuple(spatial), tuple(neighbourhood), transposed)


# --- By rows, in a library ------------------------------------------------------------------------------------------


def by_rows(
    x: Tensor,
    t: Tensor,
    neighbours: Tensor,
    ties: Tensor | None,
    spatial: Sizes,
    neighbourhood: Sizes,
    transposed: bool,
) -> Tensor:
    """y with Tᵀy = x, or Ty = x; Tᵀ is a compressed sparse matrix, whose rows are pixels with their weights."""
    S, B, channels, pixels = x.shape
    N, where = channels * pixels, _pattern(channels, spatial, neighbourhood, ties is not None)
    # [B, channels, weights of a pixel, pixels], of which the pattern leaves out what lies outside.
    weights = x.new_zeros(B, channels, 1 + neighbours.shape[2] + (0 if ties is None else channels - 1), pixels)
    weights[:, :, 0] = 1
    weights[:, :, 1 : 1 + neighbours.shape[2]] = neighbours
    for k, (c, later) in enumerate(channel_pairs(channels) if ties is not None else ()):
        assert ties is not None
        weights[:, c, later - channels] = ties[:, k]
    values = weights.mul_(t.unsqueeze(2)).flatten(1).index_select(1, where.weights)
    rows = x.reshape(S, B * N).mT.contiguous()  # a row's samples lie side by side: two dimensions are moved fast
    found = torch.empty_like(rows)
    for b in range(B if S else 0):
        matrix = torch.sparse_csr_tensor(where.starts, where.columns, values[b], (N, N), check_invariants=False)
        item = slice(b * N, (b + 1) * N)
        out = {"X": found[item], "M": rows.new_empty(0)}
        torch.ops.aten.triangular_solve.X(rows[item], matrix, True, transposed, **out)
    return found.mT.contiguous().view(x.shape)


class _Pattern(NamedTuple):
    """Of Tᵀ: row starts, columns, and which weight [channels, weights of a pixel, pixels] stands there."""

    starts: Tensor
    columns: Tensor
    weights: Tensor


@functools.lru_cache(maxsize=16)
def _pattern(channels: int, spatial: Sizes, neighbourhood: Sizes, tied: bool) -> _Pattern:
    pixels = torch.Size(spatial).numel()
    image = torch.arange(pixels).view(spatial)
    near = torch.full((1 + len(offsets(neighbourhood)), *spatial), -1)
    near[0] = image
    for k, (here, there) in enumerate(pairs(spatial, neighbourhood)):
        near[k + 1][here] = image[there]
    near = near.flatten(1)  # [weights of a pixel, pixels]
    first = torch.arange(channels)[:, None, None] * pixels
    columns = torch.where(near >= 0, near + first, -1)  # [channels, weights of a pixel, pixels]
    if tied:
        later = torch.arange(1, channels)[:, None] * pixels
        columns = torch.cat([columns, torch.where(later > first, later + image.flatten(), -1)], 1)
    weights = torch.arange(columns.numel()).view(columns.shape).transpose(1, 2)
    columns = columns.transpose(1, 2)
    inside = columns >= 0
    starts = torch.cat([torch.zeros(1, dtype=torch.long), inside.sum(2).flatten().cumsum(0)])
    with warnings.catch_warnings():  # torch's, once, that such tensors are in beta
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)
    return _Pattern(starts.int(), columns[inside].int(), weights[inside])


# --- By fronts ------------------------------------------------------------------------------------------------------


def by_fronts(
    x: Tensor,
    t: Tensor,
    neighbours: Tensor,
    ties: Tensor | None,
    spatial: Sizes,
    neighbourhood: Sizes,
    transposed: bool,
) -> Tensor:
    """y with Tᵀy = x, or Ty = x."""
    S, B, channels, pixels = x.shape
    right = x if transposed else x / t
    places = fronts(spatial, neighbourhood, right.device)
    # Pixels first and samples last, one row of zeros for neighbours that the image has not.
    rows = right.new_zeros(pixels + 1, B, channels, S)
    rows[:pixels] = right.permute(3, 1, 2, 0)[places.order]
    table = places.earlier if transposed else places.later
    weights = _weights(neighbours, table, places.order, transposed, right.dtype)
    mixing = None if ties is None else _inverse(ties.to(right.dtype), channels, places.order)
    if mixing is not None and transposed:
        mixing = mixing.mT
    for start, stop in places.bounds if transposed else reversed(places.bounds):
        near = rows.index_select(0, table[:, start:stop].flatten()).view(len(table), stop - start, B, channels, S)
        row = rows[start:stop].sub_(near.mul_(weights[:, start:stop]).sum(0))
        if mixing is not None:
            row.copy_(mixing[start:stop] @ row if len(mixing) > 1 else mixing @ row)
    y = torch.empty_like(rows[:pixels])
    y[places.order] = rows[:pixels]
    y = y.permute(3, 1, 2, 0).contiguous()
    return y.div_(t) if transposed else y


def _weights(neighbours: Tensor, table: Tensor, order: Tensor, transposed: bool, dtype: torch.dtype) -> Tensor:
    """[neighbours, pixels, B, channels, 1] in the order of the fronts, zero where there is no neighbour."""
    own = neighbours.to(dtype).permute(2, 3, 0, 1)[:, order]
    if transposed:  # the weight stands at the earlier pixel
        index = table.clamp_max(len(order) - 1)[:, :, None, None]
        own = own.gather(1, index.expand(-1, -1, *own.shape[2:]))
    return own.masked_fill((table == len(order))[:, :, None, None], 0).unsqueeze(-1)


def _inverse(ties: Tensor, channels: int, order: Tensor) -> Tensor:
    """(I + M)⁻¹ [pixels or 1, B, channels, channels] in the order of the fronts."""
    B, _, pixels = ties.shape
    inverse = torch.eye(channels, dtype=ties.dtype, device=ties.device).repeat(pixels, B, 1, 1)
    for k, (c, later) in reversed([*enumerate(channel_pairs(channels))]):
        inverse[:, :, c].addcmul_(ties[:, k].T.unsqueeze(-1), inverse[:, :, later], value=-1)
    return inverse[order] if pixels > 1 else inverse
