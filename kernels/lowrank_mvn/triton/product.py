"""Batched matrix products in the precision of the kernels, which torch's own have only where nobody has allowed tf32.

They make blocks of P from features, and of their gradients those of features and weights (`linear_blocks`). float32
operands are multiplied in three tf32 products of high and low parts; what is dropped is 2⁻²² of what is kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import Block, converted, narrow, split

ROWS, SUMMED = 64, 32  # of one program's tile of the result, and of each step of the sum
BLOCK = Block(4, 64)
BLOCK_SM_75 = Block(8, 64)  # without tensor cores for float32, where four warps spill
WIDE_ROWS, WIDE_SUMMED = 32, 16
WIDE_BLOCK = Block(4, 32)


@triton.jit
def product_kernel(
    A_ptr,  # [B, Q, K], with a further column K if ONES, as if the last row of X were followed by one of ones
    X_ptr,  # [B, K, N]
    out_ptr,  # [B, SPLITS, Q, N], each a sum over LENGTH of the K
    flag_ptr,  # [B], read if FLAGGED
    Q,
    N,
    K,
    SPLITS,
    LENGTH,
    stride_ab,
    stride_aq,
    stride_ak,
    stride_xb,
    stride_xk,
    stride_xn,
    stride_ob,
    stride_os,
    stride_oq,
    stride_on,
    ONES: tl.constexpr,
    FLAGGED: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT_TF32: tl.constexpr,
    OUTER: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, columns = tl.cdiv(Q, BLOCK_Q), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    # Programs that share a tile of X are neighbours.
    q = pid % rows * BLOCK_Q + tl.arange(0, BLOCK_Q)
    n = pid // rows % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // rows // columns
    part = (pid % SPLITS).to(tl.int64)
    b = (pid // SPLITS).to(tl.int64)
    if FLAGGED:  # noqa: SIM102  (decided when compiling)
        if tl.load(flag_ptr + b) == 0:
            return
    kind: tl.constexpr = tl.float64 if WIDE else tl.float32
    A_rows = A_ptr + b * stride_ab + q.to(tl.int64)[:, None] * stride_aq
    X_columns = X_ptr + b * stride_xb + n.to(tl.int64)[None, :] * stride_xn
    first = tl.zeros((BLOCK_Q, BLOCK_N), kind)
    second = tl.zeros((BLOCK_Q, BLOCK_N), kind)
    end = min((pid % SPLITS + 1) * LENGTH, K)
    for start in range(pid % SPLITS * LENGTH, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        offs_k = k.to(tl.int64)
        A = tl.load(A_rows + offs_k[None, :] * stride_ak, mask=(q < Q)[:, None] & (k < end)[None, :], other=0.0)
        X = tl.load(X_columns + offs_k[:, None] * stride_xk, mask=(k < end)[:, None] & (n < N)[None, :], other=0.0)
        A = converted(A, start, end, kind)
        X = converted(X, start, end, kind)
        if OUTER:  # a sum of products, for targets without float64 matrix products
            first += tl.sum(A[:, :, None] * X[None, :, :], 1)
        elif WIDE:
            first += tl.dot(A, X, out_dtype=tl.float64)
        elif SPLIT_TF32:
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
        first += ones.to(kind)[:, None]
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
    B, splits, Q, N = out.shape
    wide = kind == "float64"
    block = WIDE_BLOCK if wide else BLOCK_SM_75 if common.target(X.device) == "sm_75" else BLOCK
    block_q = min(WIDE_ROWS if wide else ROWS, common.padded_rank(Q))
    common.launch(
        product_kernel,
        (B * splits * common.ceil_div(N, block.columns) * common.ceil_div(Q, block_q),),
        block.num_warps,
        block.num_stages,
        A_ptr=A,
        X_ptr=X,
        out_ptr=out,
        flag_ptr=flags if flags is not None else out,
        Q=Q,
        N=N,
        K=X.shape[1],
        SPLITS=splits,
        LENGTH=length or max(1, X.shape[1]),
        stride_ab=A.stride(0),
        stride_aq=A.stride(1),
        stride_ak=A.stride(2),
        stride_xb=X.stride(0),
        stride_xk=X.stride(1),
        stride_xn=X.stride(2),
        stride_ob=out.stride(0),
        stride_os=out.stride(1),
        stride_oq=out.stride(2),
        stride_on=out.stride(3),
        ONES=ones,
        FLAGGED=flags is not None,
        WIDE=wide,
        SPLIT_TF32=kind == "tf32",
        OUTER=wide and not common.matrix_float64(X.device),
        BLOCK_Q=block_q,
        BLOCK_N=block.columns,
        BLOCK_K=WIDE_SUMMED if wide else SUMMED,
    )


def summed(A: Tensor, X: Tensor, kind: str) -> Tensor:
    """AXᵀ [B, Q, K] in float64, of A [B, Q, N] and X [B, K, N]: a sum over so many columns that it is cut up."""
    (B, Q, N), K = A.shape, X.shape[1]
    splits = max(1, common.ceil_div(N, common.MAX_COLUMNS))
    out = A.new_empty(B, splits, Q, K, dtype=torch.float64 if kind == "float64" else torch.float32)
    product(A, X.mT, out, kind, length=common.MAX_COLUMNS)
    return out.sum(1, dtype=torch.float64)


__all__ = ["product", "summed"]
