"""Which pixels of an item have a leverage above ½: kernels list them as they come upon them, and leave their π out.

`leverage.add_pi` then adds it, so that nothing waits for the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def without_heaviest(pi, d_inv, pixels, mask, heaviest_ptr, ROOM: tl.constexpr):
    """π, and 0 at the pixels that are listed: those with dπ < ½, as long as there is room for them in the item's list
    [1 + ROOM], which begins with their number. All in one order, whichever."""
    near = mask & (pi < 0.5 * d_inv)
    place = tl.atomic_add(heaviest_ptr + tl.zeros_like(pixels), 1, mask=near, sem="relaxed")
    near = near & (place < ROOM)
    tl.store(heaviest_ptr + 1 + place, pixels, mask=near)
    return tl.where(near, 0.0, pi)


def empty(P: Tensor, B: int, R: int) -> Tensor:
    """Lists [B, 1 + 2R] for B items: no more than 2R leverages are above ½."""
    return torch.zeros(B, 1 + 2 * R, dtype=torch.int32, device=P.device)


__all__ = ["empty", "without_heaviest"]
