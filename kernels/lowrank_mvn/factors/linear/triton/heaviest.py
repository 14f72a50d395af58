"""π at the pixels that the backward pass leaves out."""

import torch
from torch import Tensor

from ....leverage import Listed
from .. import forms
from ..aten.pixels import Pixels
from . import moments


def add_pi(grad_d: Tensor, listed: Tensor, F: Tensor, W: Tensor, d: Tensor, L_inv: Tensor, b: Tensor) -> None:
    """Adds bπ to grad_d [B, channels, pixels] at the pixels of the lists, numbered through all channels; W in
    float64."""
    channels = W.shape[1]

    def gram(precision: Tensor, flags: Tensor, mix: Tensor | None) -> Tensor:
        rows = W if mix is None else forms.weighted(mix, W)
        precision = precision.unflatten(1, (channels, -1))
        G, _, _ = moments.sums(None, None, F, precision, channels, "float64", inverted=True, flags=flags)
        G = torch.where(flags[:, None, None, None] > 0, G, G.new_zeros(()))
        return forms.gram(torch.matmul(rows, G), rows)

    Listed(listed, d.flatten(1), L_inv, Pixels(None, F, W).rows, gram, False).add_pi(grad_d.flatten(1), b)


__all__ = ["add_pi"]
