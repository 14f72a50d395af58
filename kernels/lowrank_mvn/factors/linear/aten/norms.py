"""diag PPᵀ: the squared norms of the rows of P, from tiles of it, and their gradients."""

import torch
from torch import Tensor

from ....capacitance import product_dtype
from ....device.pages import Scratch, empty_gradient
from . import blocks


def row_norms(F: Tensor, W: Tensor) -> Tensor:
    """‖pₙ‖² [B, channels, pixels]."""
    (B, _, pixels), (channels, R, K1) = F.shape, W.shape[1:]
    dtype = product_dtype(F, W)
    weight = blocks.rows(W.to(dtype))
    norms = F.new_empty(B, channels, pixels, dtype=dtype)
    copies, scratch = Scratch(dtype, F.device), Scratch(dtype, F.device)
    for b, n in blocks.blocks(F, K1 + channels * R, slice(0, B)):
        f = blocks.features(F, b, n, copies)
        p = blocks.rows_from(blocks.of_items(weight, b), f, out=scratch.shaped(f.shape[0], channels * R, f.shape[2]))
        norms[b, :, n] = p.square_().unflatten(1, (R, channels)).sum(1)
    return norms


def row_norms_backward(grad: Tensor, F: Tensor, W: Tensor, need_F: bool) -> tuple[Tensor, Tensor]:
    """grad_F (empty if not needed) and grad_W, of grad_pₙ = 2 gradₙ pₙ."""
    (B, K, _), (channels, R, K1) = F.shape, W.shape[1:]
    dtype = product_dtype(F, W)
    weight = blocks.rows(W.to(dtype))
    grad_F = empty_gradient(F) if need_F else F.new_empty(0)
    grad_rows = F.new_zeros(B, channels * R, K1, dtype=torch.float64)
    copies, scratch = Scratch(dtype, F.device), Scratch(dtype, F.device)
    for b, n in blocks.blocks(F, K1 + channels * R, slice(0, B)):
        f, own = blocks.features(F, b, n, copies), blocks.of_items(weight, b)
        p = blocks.rows_from(own, f, out=scratch.shaped(f.shape[0], channels * R, f.shape[2]))
        blocks.scale(p, 2 * grad[b, :, n].to(dtype))
        blocks.add_products(grad_rows[b], p, f)
        if need_F:
            grad_F[b, :, n] = torch.bmm(own[..., :K].mT, p)
    grad_W = grad_rows.unflatten(1, (R, channels)).transpose(1, 2)
    return grad_F, (grad_W.sum(0, keepdim=True) if W.shape[0] == 1 else grad_W).to(W.dtype).contiguous()
