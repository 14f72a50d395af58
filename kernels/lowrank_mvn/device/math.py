"""Arithmetic of the kernels: products in split tf32, reciprocals, logarithms of products, and normal noise.

What rounds to float32 in a product is decided by its kind, a constant of each kernel:

    "tf32"      three products of high and low parts, error 2⁻²¹, where tensor cores take tf32
    "float32"   one product of float32
    "float64"   one product of float64, on tensor cores or units of its own
    "outer"     likewise as a sum of products, for targets on which Triton does not multiply float64 matrices
"""

import triton
import triton.language as tl


@triton.jit
def split(a):
    """a = high + low: high has the 11 significant bits that a tensor core reads, low is exact in float32."""
    bits = a.to(tl.int32, bitcast=True)
    high = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, a - high


@triton.jit
def reciprocal(d):
    """1/d in float64 without a division: one Newton step from float32 leaves a relative error of 1e-14."""
    if d.dtype == tl.float64:
        return 1.0 / d
    else:
        d64 = d.to(tl.float64)
        guess = (1.0 / d.to(tl.float32)).to(tl.float64)
        return guess * (2.0 - d64 * guess)


@triton.jit
def narrow(a, like_ptr):
    """`a` in the dtype that `like_ptr` points to; half precision by way of float32."""
    if like_ptr.dtype.element_ty == tl.float64:
        return a.to(tl.float64)
    else:
        return a.to(tl.float32).to(like_ptr.dtype.element_ty)


# --- QQᵀ of tiles [R, n], of which a kernel stores the lower triangle ---------------------------------------------


@triton.jit
def add_gram(sums, Q, Q_other, KIND: tl.constexpr, SAME: tl.constexpr, EXACT: tl.constexpr = False):
    """`sums` + Q Q_otherᵀ of two tiles [R, n], which are one if SAME; `gram_of` gives the total.

    With q = high + low, QQᵀ ≈ high highᵀ + low highᵀ + (low highᵀ)ᵀ: what is dropped, low lowᵀ, is at most 2⁻²² of what
    is kept, and the transpose is added once, after the loop. EXACT says that low is zero.
    """
    first, second = sums
    if KIND == "outer":
        first += tl.sum(Q[:, None, :] * Q_other[None, :, :], 2)
    elif KIND == "float64":
        first += tl.dot(Q, tl.trans(Q_other), out_dtype=tl.float64)
    elif KIND == "tf32" and EXACT:
        first = tl.dot(Q, tl.trans(Q_other), first, input_precision="tf32")
    elif KIND == "tf32":
        high, low = split(Q)
        if SAME:
            high_other = high
        else:
            high_other, low_other = split(Q_other)
            second = tl.dot(high, tl.trans(low_other), second, input_precision="tf32")
        first = tl.dot(high, tl.trans(high_other), first, input_precision="tf32")
        second = tl.dot(low, tl.trans(high_other), second, input_precision="tf32")
    else:
        first = tl.dot(Q, tl.trans(Q_other), first, input_precision="ieee")
    return first, second


@triton.jit
def gram_of(sums, KIND: tl.constexpr, SAME: tl.constexpr, EXACT: tl.constexpr = False):
    """The total of `add_gram`."""
    total, second = sums
    if KIND == "tf32" and not EXACT:
        total += second
        if SAME:
            total += tl.trans(second)
    return total


@triton.jit
def product(P, high, low, whole, KIND: tl.constexpr, T=None):
    """T + PᵀA of an operand P and a matrix A [rows, m] = high + low = whole: in three tf32 products, or in float32."""
    P = P.to(tl.float32)
    if KIND == "tf32":
        P_high, P_low = split(P)
        T = tl.dot(P_low, high, T, input_precision="tf32")
        T = tl.dot(P_high, low, T, input_precision="tf32")
        return tl.dot(P_high, high, T, input_precision="tf32")
    else:
        return tl.dot(P, whole, T, input_precision="ieee")


# --- Σ log d of many columns: the same rounding error at each of N pixels would add up to N errors ----------------


@triton.jit
def no_logs(BLOCK_N: tl.constexpr):
    """Accumulators of `add_logs`: Σ exponents, Π mantissas, whether all were positive and normal, Σ logarithms."""
    exponents = tl.zeros((BLOCK_N,), tl.int32)
    mantissas = tl.full((BLOCK_N,), 1.0, tl.float64)
    valid = tl.full((BLOCK_N,), 1, tl.int32)
    return exponents, mantissas, valid, tl.zeros((BLOCK_N,), tl.float64)


@triton.jit
def add_logs(sums, d):
    """Adds log d: in float64 the logarithms; in float32 the exponents, which are exact, and mantissas as a product."""
    exponents, mantissas, valid, logs = sums
    if d.dtype == tl.float64:
        logs += tl.log(d)
    else:
        bits = d.to(tl.int32, bitcast=True)
        exponents += (bits >> 23) - 127
        mantissas *= ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True).to(tl.float64)
        valid = tl.minimum(valid, ((bits >= 0x800000) & (bits < 0x7F800000)).to(tl.int32))
    return exponents, mantissas, valid, logs


@triton.jit
def sum_of_logs(sums, WIDE: tl.constexpr):
    """Σ log d, NaN unless every value was positive and normal."""
    exponents, mantissas, valid, logs = sums
    if WIDE:
        return tl.sum(logs, 0)
    else:
        log2 = tl.full((), 0.6931471805599453, tl.float64)  # a bare number would be a float32
        total = tl.sum(exponents.to(tl.float64) * log2 + tl.log(mantissas), 0)
        return tl.where(tl.min(valid, 0) > 0, total, float("nan"))


# --- ω_d: Philox with the item's seed as key and (column / 4, sample) as counter ---------------------------------


@triton.jit
def _cos_sin_turns(u):
    """cos 2πu and sin 2πu for u in [0, 1): a quarter turn and a polynomial, without the library's long reduction."""
    quarter = (u * 4.0 + 0.5).to(tl.int32)
    t = (u - quarter.to(tl.float32) * 0.25) * 6.283185307179586
    t2 = t * t
    sin = t + t * t2 * (-1.6666654611e-1 + t2 * (8.3321608736e-3 - t2 * 1.9515295891e-4))
    cos = 1.0 - 0.5 * t2 + t2 * t2 * (4.166664568298827e-2 + t2 * (-1.388731625493765e-3 + t2 * 2.443315711809948e-5))
    swap = (quarter & 1) != 0
    c = tl.where(swap, -sin, cos)
    s = tl.where(swap, cos, sin)
    flip = (quarter & 2) != 0
    return tl.where(flip, -c, c), tl.where(flip, -s, s)


@triton.jit
def _normal_pair(a, b):
    """Two standard normals of two words of noise (Box and Muller)."""
    radius = tl.sqrt(-2.0 * tl.log(((a >> 8).to(tl.int32).to(tl.float32) + 0.5) * 5.960464477539063e-08))
    cos, sin = _cos_sin_turns((b >> 8).to(tl.int32).to(tl.float32) * 5.960464477539063e-08)
    return radius * cos, radius * sin


@triton.jit
def _four_normals(seed, group, s):
    none = tl.zeros(group.shape, tl.uint32)
    a, b, c, d = tl.philox(seed, group, none + s.to(tl.uint32), none, none)
    a, b = _normal_pair(a, b)
    c, d = _normal_pair(c, d)
    return a, b, c, d


@triton.jit
def normals(seed, n, s, BLOCK_N: tl.constexpr):
    """ω_d of sample s at columns n … n + BLOCK_N − 1, where n is a multiple of 4: the same whatever the blocks."""
    a, b, c, d = _four_normals(seed, (n // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32), s)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK_N,))


@triton.jit
def normals_anywhere(seed, n, s):
    """`normals` of single columns n, where the first is not a multiple of 4: each draws the noise of its four."""
    a, b, c, d = _four_normals(seed, (n // 4).to(tl.uint32), s)
    lane = n % 4
    return tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))
