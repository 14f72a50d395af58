"""Memory of the passes on the CPU: what a block needs, what waits for the backward pass, and large gradients.

What a fresh page costs at its first touch is a large part of a pass, and what the C library keeps between two pieces is
counted in the peak (kernels/LOG.md). On other devices, and for small pieces, all of these are torch's own.
"""

import ctypes
import math
import mmap
import sys

import torch
from torch import Tensor

# From here on what waits for the backward pass lies in pages of its own; on Linux all of them are touched at once.
MAPPED_BYTES = 1 << 20
MAPPED_LIKE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE} if sys.platform == "linux" else {}
# From here on a gradient is given huge pages.
HUGE_BYTES = 1 << 22


class Scratch:
    """Memory for what is made of one block, used again for every block.

    Memory that is allocated anew for each block may be given back to the system in between, and then costs its first
    touch every time: up to as much as all else together (kernels/LOG.md).
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self._flat = torch.empty(0, dtype=dtype, device=device)

    def shaped(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        if self._flat.numel() < size:
            self._flat = self._flat.new_empty(size)
        return self._flat[:size].view(shape)

    def like(self, p: Tensor) -> Tensor:
        """In the layout of a block of P."""
        b, n, R = p.shape
        return self.shaped(b, n, R) if p.stride(-1) <= p.stride(-2) else self.shaped(b, R, n).mT


def mapped(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor for what waits for the backward pass, on the CPU in pages of its own.

    In the C library's heap it would leave a hole that small pieces break, so that the next one finds no place there.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < MAPPED_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, size, **MAPPED_LIKE), dtype=dtype).view(shape)


def empty_gradient(P: Tensor) -> Tensor:
    """A gradient of P's size and layout, on Linux in huge pages that one thread touches at once.

    The first touch of 4 KiB pages takes a third of the whole backward pass. Huge pages touched by all threads cost no
    more on a quiet machine, but made a step up to 1.6 times as long on a virtual one that gives free memory back.
    """
    grad = torch.empty_like(P)
    if sys.platform == "linux" and grad.device.type == "cpu" and grad.nbytes >= HUGE_BYTES:
        libc, end = ctypes.CDLL(None), grad.data_ptr() + grad.nbytes
        # MADV_HUGEPAGE and MADV_POPULATE_WRITE: hints, so that a refusal is no error.
        for page, advice in ((1 << 21, 14), (mmap.PAGESIZE, 23)):
            start = -(-grad.data_ptr() // page) * page
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t((end - start) // page * page), advice)
    return grad
