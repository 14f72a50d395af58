"""π at the pixels that the backward pass leaves out, and its sum where there is one d."""

import torch
from torch import Tensor

from .... import leverage
from ....capacitance import sum_of_pi
from .. import forms
from ..aten.pixels import Pixels
from . import moments


def add_pi(grad_d: Tensor, listed: Tensor, F: Tensor, W: Tensor, d: Tensor, L_inv: Tensor, b: Tensor) -> None:
    """Adds bπ to grad_d [B, channels, pixels] at the pixels of the lists, numbered through all channels; W in
    float64."""
    channels = W.shape[1]

    def gram(precision: Tensor, flags: Tensor) -> Tensor:
        precision = precision.unflatten(1, (channels, -1))
        G, _, _ = moments.sums(None, None, F, precision, channels, "float64", inverted=True, flags=flags)
        G = torch.where(flags[:, None, None, None] > 0, G, G.new_zeros(()))
        return forms.gram(torch.matmul(W, G), W)

    leverage.add_pi(grad_d.flatten(1), listed, d.flatten(1), L_inv, b, Pixels(None, F, W).rows, gram)


def total_pi(F: Tensor, W: Tensor, d: Tensor, L_inv: Tensor) -> Tensor:
    """Σπ [B] for one d [B, 1, 1]; W in float64."""
    N = W.shape[1] * F.shape[2]
    if L_inv.shape[1] < N:
        return sum_of_pi(d[:, 0, 0], N, L_inv)
    pixels = torch.arange(N, device=F.device).expand(len(F), N)
    return leverage.sum_of_few(Pixels(None, F, W).rows(pixels), d[:, 0, 0], L_inv)


__all__ = ["add_pi", "total_pi"]
