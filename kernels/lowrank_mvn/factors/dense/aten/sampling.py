"""Samples y = μ + Pω_p + √d ω_d from given noise, and their gradients."""

import torch
from torch import Tensor

from ....capacitance import product_dtype
from ....device.pages import empty_gradient
from . import blocks

NO_NOISE = "drawing ω_d from a seed is for the kernels: aten takes the noise"


def rsample(loc: Tensor, P: Tensor, d: Tensor, omega_p: Tensor, omega_d: Tensor | None, seed: Tensor | None) -> Tensor:
    """y = μ + Pω_p + √d ω_d [S, B, N] in loc's dtype, with the noise given."""
    if omega_d is None:
        raise ValueError(NO_NOISE)
    S, (B, N, _) = omega_p.shape[0], P.shape
    dtype = product_dtype(loc, P, d)
    y, omega = loc.new_empty(S, B, N), omega_p.transpose(0, 1).to(dtype)
    for b, n, part in blocks.vector_blocks(P, S, slice(0, B), dtype) if S else ():
        root = blocks.diagonal(d, b, n, dtype).sqrt()
        shift = loc[:, b, n].to(dtype).addcmul(omega_d[:, b, n].to(dtype), root).transpose(0, 1)
        out = y.transpose(0, 1)[b, :, n]
        for i, j, p in blocks.factor_blocks(part, S, dtype):
            out[i, :, j] = torch.baddbmm(shift[i, :, j], omega[b][i], p.to(dtype).mT)
    return y


def rsample_backward(
    grad_y: Tensor,
    P: Tensor,
    d: Tensor,
    omega_p: Tensor,
    omega_d: Tensor | None,
    seed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_P, grad_d and grad_ω_d, each in its input's shape and dtype; empty where `needs` says no."""
    assert omega_d is not None, NO_NOISE
    need_P, need_d, need_omega_d = needs
    S, B, _ = grad_y.shape
    dtype, one_d = product_dtype(grad_y, P, d), d.shape[1] == 1
    grad_P = empty_gradient(P) if need_P else P.new_empty(0)
    grad_d = d.new_zeros(d.shape, dtype=torch.float64 if one_d else dtype) if need_d else d.new_empty(0)
    grad_omega_d = omega_d.new_empty(omega_d.shape if need_omega_d else 0)
    omega = omega_p.transpose(0, 1).to(dtype)
    for b, n, part in blocks.vector_blocks(P, S, slice(0, B), dtype):
        g = grad_y[:, b, n].to(dtype).transpose(0, 1)
        root = blocks.diagonal(d, b, n, dtype).sqrt()
        if need_d:
            product = (g * omega_d[:, b, n].to(dtype).transpose(0, 1)).sum(1)
            if one_d:
                grad_d[b] += product.sum(1, keepdim=True, dtype=torch.float64) / (2 * root)
            else:
                grad_d[b, n] = product / (2 * root)
        if need_omega_d:
            grad_omega_d[:, b, n] = (g * root.unsqueeze(1)).transpose(0, 1)
        for i, j, p in blocks.factor_blocks(part, S, dtype) if need_P else ():
            z, out = g[i, :, j].mT, grad_P[b, n][i, j]
            if S == 1 and p.dtype == dtype:  # straight into the gradient: a step less
                torch.mul(z, omega[b][i], out=out)
            else:
                out.copy_(torch.bmm(z, omega[b][i]))
    return grad_P, grad_d.to(d.dtype), grad_omega_d


def noise(seed: Tensor, S: int, N: int, dtype: torch.dtype) -> Tensor:
    """Only the kernels draw noise from a seed."""
    raise ValueError(NO_NOISE)
