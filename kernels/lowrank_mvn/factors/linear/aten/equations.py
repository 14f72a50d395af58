"""The gradients of Pᵀ diag(ρ) P and Pᵀ diag(ρ) δ for a precision ρ, from tiles pₙ = W_cf̃ₙ of P:

    grad_pₙ = ρₙ (Apₙ + Σ_s B_s δₛₙ)      grad_δₛₙ = ρₙ B_sᵀpₙ      grad_ρₙ = ½ pₙᵀApₙ + Σ_s δₛₙ B_sᵀpₙ

with A = grad_gram + grad_gramᵀ and B = grad_w.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ....capacitance import product_dtype
from ....device.pages import Scratch, empty_gradient
from .. import forms
from . import blocks


class Deviations(NamedTuple):
    """What the samples bring: δ = x − loc − F̃ᵀm, and the gradient of their projections."""

    x: Tensor  # [S, B, channels, pixels]
    loc: Tensor | None
    m: Tensor | None  # [channels, K+1]
    grad_w: Tensor  # [S, B, R]
    grad_x: Tensor  # is filled; empty where nobody needs it


def gram_backward(
    grad_gram: Tensor, F: Tensor, W: Tensor, precision: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_F, grad_W and grad_ρ; `needs` is for F and ρ: what is not needed is empty."""
    grad_F, grad_rows, grad_precision = _gradients(grad_gram, None, F, W, precision, *needs)
    return grad_F, _of_weight(grad_rows, W), grad_precision


def normal_equations_backward(
    grad_gram: Tensor,
    grad_w: Tensor,
    x: Tensor,
    loc: Tensor | None,
    F: Tensor,
    W: Tensor,
    m: Tensor | None,
    precision: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_x [S, B, channels, pixels], grad_F, grad_W, grad_m (empty without m) and grad_ρ; `needs` is for x, F and ρ:
    what is not needed is empty."""
    need_x, *rest = needs
    (S, _, channels), R = x.shape[:3], W.shape[2]
    grad_x = x.new_empty(x.shape if need_x else 0, dtype=product_dtype(x, F, W, precision))
    samples = Deviations(x, loc, m, grad_w, grad_x)
    grad_F, grad_rows, grad_precision = _gradients(grad_gram, samples, F, W, precision, *rest)
    of_P, of_x = grad_rows.split([channels * R, S * channels], 1)
    grad_m = F.new_empty(0) if m is None else -of_x.unflatten(1, (S, channels)).sum((0, 1)).to(m.dtype)
    return grad_x, grad_F, _of_weight(of_P, W), grad_m, grad_precision


def _of_weight(grad_rows: Tensor, W: Tensor) -> Tensor:
    """grad_W of the gradients of P times F̃ᵀ, [B, R·channels, K+1]."""
    grad: Tensor = grad_rows.unflatten(1, (W.shape[2], W.shape[1])).transpose(1, 2)
    return (grad.sum(0, keepdim=True) if W.shape[0] == 1 else grad).to(W.dtype).contiguous()


def _gradients(
    grad_gram: Tensor, samples: Deviations | None, F: Tensor, W: Tensor, precision: Tensor, need_F: bool, need_rho: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_F, the gradients of rows of P and of δ times F̃ᵀ [B, R·channels + S·channels, K+1], and grad_ρ."""
    (channels, R, K1), K = W.shape[1:], F.shape[1]
    dtype, S = product_dtype(F, W, precision, *([samples.x] if samples else [])), samples.x.shape[0] if samples else 0
    CR, SC = channels * R, S * channels
    weight, A = blocks.rows(W.to(dtype)), (grad_gram + grad_gram.mT).to(dtype)
    mean = samples.m.to(dtype) if samples and samples.m is not None else None
    grad_F = empty_gradient(F) if need_F else F.new_empty(0)
    grad_rho = precision.new_zeros(precision.shape if need_rho else 0, dtype=torch.float64)
    grad_rows = F.new_zeros(F.shape[0], CR + SC, K1, dtype=torch.float64)
    copies, scratch = Scratch(dtype, F.device), Scratch(dtype, F.device)
    for b, n in blocks.blocks(F, K + 2 * CR + SC, slice(0, F.shape[0])):
        f, own = blocks.features(F, b, n, copies), blocks.of_items(weight, b)
        count, _, pixels = f.shape
        p, made = blocks.carved(scratch, (count, CR, pixels), (count, CR + SC, pixels))
        blocks.rows_from(own, f, out=p)
        rho = precision[b, :, n if precision.shape[2] > 1 else slice(None)].to(dtype)
        columns = p.view(count, R, channels * pixels)
        grad_p = made[:, :CR]
        grad_p.copy_(torch.bmm(A[b], columns).view(count, CR, pixels))
        terms = 0.5 * (p * grad_p).unflatten(1, (R, channels)).sum(1) if need_rho else None
        if samples:
            _add_samples(samples, mean, b, n, f, columns, made, terms)
        if terms is not None and forms.one_d(precision):
            grad_rho[b] += terms.sum((1, 2), dtype=torch.float64)[:, None, None]
        elif terms is not None:
            grad_rho[b, :, n] = terms.double()
        blocks.scale(made, rho.expand(-1, channels, -1))
        if samples and samples.grad_x.numel():
            samples.grad_x[:, b, :, n] = made[:, CR:].unflatten(1, (S, channels)).transpose(0, 1)
        blocks.add_products(grad_rows[b], made, f)
        if need_F:
            rows, used = own, made if mean is not None else grad_p
            if mean is not None:
                rows = torch.cat([own, -mean.repeat(S, 1).expand(count, SC, K1)], 1)
            grad_F[b, :, n] = torch.bmm(rows[..., :K].mT, used)
    return grad_F, grad_rows, grad_rho.to(precision.dtype)


def _add_samples(
    samples: Deviations,
    mean: Tensor | None,
    b: slice,
    n: slice,
    f: Tensor,
    columns: Tensor,
    made: Tensor,
    terms: Tensor | None,
) -> None:
    """grad_δ/ρ into `made` below grad_p/ρ, to which Σ_s B_s δₛₙ is added; and their part of grad_ρ into `terms`."""
    (S, _, channels), (count, R, _), pixels = samples.x.shape[:3], columns.shape, f.shape[2]
    back = samples.grad_w[:, b].transpose(0, 1).to(f.dtype)  # [b, S, R]
    delta = blocks.delta(samples.x, samples.loc, b, n, f.dtype)
    if mean is not None:
        delta = delta - blocks.rows_from(mean.expand(count, *mean.shape), f).repeat(1, S, 1)
    grad_p, grad_delta = made[:, : channels * R], made[:, channels * R :]
    grad_delta.copy_(torch.bmm(back, columns).view(count, S * channels, pixels))
    if terms is not None:
        terms += (delta * grad_delta).unflatten(1, (S, channels)).sum(1)
    if S:
        grad_p += torch.bmm(back.mT, delta.reshape(count, S, channels * pixels)).view(count, channels * R, pixels)
