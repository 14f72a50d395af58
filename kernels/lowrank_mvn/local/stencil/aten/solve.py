"""Tᵀy = x by back-substitution, and Ty = x by forward substitution: all pixels of a front at once.

With T = U diag(t₀), whose U has a unit diagonal: Uᵀy = x/t₀, or Uu = x and y = u/t₀. The channels of a pixel are one
triangular system I + M of its ties, whose inverse is made for all pixels before.
"""

import torch
from torch import Tensor

from ....capacitance import product_dtype
from ..grid import Sizes, channel_pairs, fronts


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
    places = fronts(tuple(spatial), tuple(neighbourhood), x.device)
    t = log_diagonal.to(dtype).exp()
    right = x.to(dtype) if transposed else x.to(dtype) / t
    # Pixels first and samples last, one row of zeros for neighbours that the image has not.
    S, B, channels, pixels = x.shape
    rows = x.new_zeros(pixels + 1, B, channels, S, dtype=dtype)
    rows[:pixels] = right.permute(3, 1, 2, 0)[places.order]
    table = places.earlier if transposed else places.later
    weights = _weights(neighbours, table, places.order, transposed, dtype)
    mixing = None if ties is None else _inverse(ties.to(dtype), channels, places.order)
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
