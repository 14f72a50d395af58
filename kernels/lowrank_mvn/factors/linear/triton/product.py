"""Batched matrix products in the precision of the kernels, which torch's own have only where nobody has allowed tf32.

They make blocks of P from features, and of their gradients those of features and weights (`blocks`). float32
operands are multiplied in three tf32 products of high and low parts; what is dropped is 2⁻²² of what is kept.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....device import launch
from ....device.launch import Block
from ....device.math import narrow, split
from ....device.tiles import converted

ROWS, SUMMED = 64, 32  # of one program's tile of the result, and of each step of the sum
BLOCK = Block(4, 64)
BLOCK_SM_75 = Block(8, 64)  # without tensor cores for float32, where four warps spill
WIDE_ROWS, WIDE_SUMMED = 32, 16
WIDE_BLOCK = Block(4, 32)


class Tile(NamedTuple):
    """One program's tile of the result, and of each step of the sum."""

    ROWS: int
    COLUMNS: int
    SUMMED: int


@triton.jit
def product_kernel(
    A_at,  # [B, Q, K], with a further column K if ONES, as if the last row of X were followed by one of ones
    X_at,  # [B, K, N]
    out_at,  # [B, SPLITS, Q, N]
    flag_ptr,  # [B], or none for all items
    sizes,  # Q, K, N
    cut,  # SPLITS of the sum, and how much of K is in each
    ONES: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    """Σ_k A_qk X_kn of one split of the k, for some rows q and columns n."""
    BLOCK_Q: tl.constexpr = TILE.ROWS
    BLOCK_N: tl.constexpr = TILE.COLUMNS
    BLOCK_K: tl.constexpr = TILE.SUMMED
    dtype: tl.constexpr = tl.float64 if KIND == "float64" or KIND == "outer" else tl.float32
    Q, K, N = sizes
    SPLITS, length = cut
    A_ptr, stride_ab, stride_aq, stride_ak = A_at
    X_ptr, stride_xb, stride_xk, stride_xn = X_at
    out_ptr, stride_ob, stride_os, stride_oq, stride_on = out_at
    rows, columns = tl.cdiv(Q, BLOCK_Q), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    # Programs that share a tile of X are neighbours.
    q = pid % rows * BLOCK_Q + tl.arange(0, BLOCK_Q)
    n = pid // rows % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // rows // columns
    part = (pid % SPLITS).to(tl.int64)
    b = (pid // SPLITS).to(tl.int64)
    if flag_ptr is not None:  # noqa: SIM102  (decided when compiling)
        if tl.load(flag_ptr + b) == 0:
            return
    A_rows = A_ptr + b * stride_ab + q.to(tl.int64)[:, None] * stride_aq
    X_columns = X_ptr + b * stride_xb + n.to(tl.int64)[None, :] * stride_xn
    first = tl.zeros((BLOCK_Q, BLOCK_N), dtype)
    second = tl.zeros((BLOCK_Q, BLOCK_N), dtype)
    end = min((pid % SPLITS + 1) * length, K)
    for start in range(pid % SPLITS * length, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        offs_k = k.to(tl.int64)
        A = tl.load(A_rows + offs_k[None, :] * stride_ak, mask=(q < Q)[:, None] & (k < end)[None, :], other=0.0)
        X = tl.load(X_columns + offs_k[:, None] * stride_xk, mask=(k < end)[:, None] & (n < N)[None, :], other=0.0)
        A = converted(A, start, end, dtype)
        X = converted(X, start, end, dtype)
        if KIND == "outer":
            first += tl.sum(A[:, :, None] * X[None, :, :], 1)
        elif KIND == "float64":
            first += tl.dot(A, X, out_dtype=tl.float64)
        elif KIND == "tf32":
            A_high, A_low = split(A)
            X_high, X_low = split(X)
            first = tl.dot(A_high, X_high, first, input_precision="tf32")
            second = tl.dot(A_high, X_low, second, input_precision="tf32")
            second = tl.dot(A_low, X_high, second, input_precision="tf32")
        else:
            first = tl.dot(A, X, first, input_precision="ieee")
    first += second
    if ONES:
        ones = tl.load(A_ptr + b * stride_ab + q.to(tl.int64) * stride_aq + K * stride_ak, mask=q < Q, other=0.0)
        first += ones.to(dtype)[:, None]
    offsets = q.to(tl.int64)[:, None] * stride_oq + n.to(tl.int64)[None, :] * stride_on
    mask = (q < Q)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + b * stride_ob + part * stride_os + offsets, narrow(first, out_ptr), mask=mask)


def product(
    A: Tensor, X: Tensor, out: Tensor, kind: str, ones: bool = False, flags: Tensor | None = None, length: int = 0
) -> None:
    """Fills `out` [B, SPLITS, Q, N] with AX, of A [B, Q, K] and X [B, K, N], any strides.

    Each of the SPLITS is the sum over `length` of the K (all of them by default). With `ones` A has a column more, X a
    row of ones that is not there. With `flags` only the items whose flag is set are made.
    """
    (B, splits, Q, N), K = out.shape, X.shape[1]
    wide = kind == "float64"
    block = WIDE_BLOCK if wide else BLOCK_SM_75 if launch.target(X.device) == "sm_75" else BLOCK
    rows = min(WIDE_ROWS if wide else ROWS, launch.padded_rank(Q))
    launch.launch(
        product_kernel,
        (B * splits * launch.ceil_div(N, block.columns) * launch.ceil_div(Q, rows),),
        block.num_warps,
        block.num_stages,
        A_at=launch.at(A),
        X_at=launch.at(X),
        out_at=launch.at(out),
        flag_ptr=flags,
        sizes=(Q, K, N),
        cut=(splits, length or max(1, K)),
        ONES=ones,
        KIND=launch.of_matrices(kind, X.device),
        TILE=Tile(rows, block.columns, WIDE_SUMMED if wide else SUMMED),
    )


def summed(A: Tensor, X: Tensor, kind: str) -> Tensor:
    """AXᵀ [B, Q, K] in float64, of A [B, Q, N] and X [B, K, N]: a sum over so many columns that it is cut up."""
    (B, Q, N), K = A.shape, X.shape[1]
    splits = max(1, launch.ceil_div(N, launch.MAX_COLUMNS))
    out = A.new_empty(B, splits, Q, K, dtype=torch.float64 if kind == "float64" else torch.float32)
    product(A, X.mT, out, kind, length=launch.MAX_COLUMNS)
    return out.sum(1, dtype=torch.float64)


__all__ = ["product", "summed"]
