// Tensors as they lie in memory, and how pixels of them are brought to rows in the first-level cache and back.
#pragma once

#include "vectors.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace VARIANT {

enum Kind : int64_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

// As `views.py` packs it. Strides are in elements; an index that a tensor does not have has stride 0.
struct Tensor {
    char *data;
    int64_t kind;
    int64_t stride[3];

    INLINE int64_t at(int64_t i, int64_t j, int64_t k) const { return i * stride[0] + j * stride[1] + k * stride[2]; }
};

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class U> INLINE U bits_of(float value) { U bits; memcpy(&bits, &value, sizeof bits); return bits; }
INLINE float float_of(uint32_t bits) { float value; memcpy(&value, &bits, sizeof value); return value; }

// --- One value. Without branches, so that the compiler makes vectors of the loops around them. ------------------------

INLINE float value_of(float a) { return a; }
INLINE double value_of(double a) { return a; }
INLINE float value_of(bfloat16 a) { return float_of(uint32_t(a.bits) << 16); }
INLINE float value_of(float16 a) {
    // Exponent and significand moved into place are too small by 2^112; a subnormal is the fraction behind a leading one.
    const uint32_t word = uint32_t(a.bits) << 16, sign = word & 0x80000000u, twice = word + word;
    const float normal = float_of((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
    const float subnormal = float_of((twice >> 17) | (126u << 23)) - 0.5f;
    return float_of(sign | bits_of<uint32_t>(twice < (1u << 27) ? subnormal : normal));
}

template <class T> INLINE void put(float &to, T a) { to = float(a); }
template <class T> INLINE void put(double &to, T a) { to = double(a); }
template <class T> INLINE void put(bfloat16 &to, T a) {
    const uint32_t bits = bits_of<uint32_t>(float(a)), odd = (bits >> 16) & 1;
    to.bits = a == a ? (bits + 0x7FFFu + odd) >> 16 : 0x7FC0u; // to the nearest, ties to even
}
template <class T> INLINE void put(float16 &to, T a) {
    const float value = float(a);
    const uint32_t bits = bits_of<uint32_t>(value), twice = bits + bits, sign = bits & 0x80000000u;
    // Added to a power of two whose last place is that of the result, the value is rounded to it.
    const float scaled = (__builtin_fabsf(value) * 0x1.0p+112f) * 0x1.0p-110f;
    uint32_t bias = twice & 0xFF000000u;
    bias = bias < 0x71000000u ? 0x71000000u : bias;
    const uint32_t sum = bits_of<uint32_t>(float_of((bias >> 1) + 0x07800000u) + scaled);
    const uint32_t magnitude = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
    to.bits = uint16_t((sign >> 16) | (twice > 0xFF000000u ? 0x7E00u : magnitude));
}

// Calls f(pointer of the type) for the type that a tensor's values have.
template <class F> INLINE void with_type(const Tensor &t, const F &f) {
    switch (t.kind) {
    case FLOAT32: return f((float *)t.data);
    case FLOAT64: return f((double *)t.data);
    case BFLOAT16: return f((bfloat16 *)t.data);
    default: return f((float16 *)t.data);
    }
}

// --- Rows of pixels ---------------------------------------------------------------------------------------------------

// `n` values from index (i, j, k) on, `stride` apart; zeros behind them up to `padded`.
template <class T> void load_row(T *row, const Tensor &t, int64_t start, int64_t stride, int64_t n, int64_t padded) {
    with_type(t, [&](auto *data) {
        const auto *p = data + start;
        if (stride == 1)
            for (int64_t i = 0; i < n; i++) row[i] = T(value_of(p[i]));
        else
            for (int64_t i = 0; i < n; i++) row[i] = T(value_of(p[i * stride]));
    });
    for (int64_t i = n; i < padded; i++) row[i] = 0;
}

template <class T> void store_row(const Tensor &t, int64_t start, int64_t stride, const T *row, int64_t n) {
    with_type(t, [&](auto *data) {
        auto *p = data + start;
        if (stride == 1)
            for (int64_t i = 0; i < n; i++) put(p[i], row[i]);
        else
            for (int64_t i = 0; i < n; i++) put(p[i * stride], row[i]);
    });
}

// --- Blocks of P: pixels in memory, columns in rows -----------------------------------------------------------------

template <class T, class In> INLINE Eight<T> eight_of(const In *p) {
    Eight<T> a;
    for (int i = 0; i < 8; i++) a[i] = T(value_of(p[i]));
    return a;
}
template <> INLINE Eight<float> eight_of<float, float>(const float *p) { return load8(p); }
template <> INLINE Eight<double> eight_of<double, double>(const double *p) { return load8(p); }
template <> INLINE Eight<double> eight_of<double, float>(const float *p) {
#ifdef __AVX512F__ // GCC 12 converts in halves otherwise, and puts these together
    return (Eight<double>)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#else
    return __builtin_convertvector(load8(p), Eight<double>);
#endif
}

template <class Out, class T> INLINE void put_eight(Out *p, Eight<T> a) {
    for (int i = 0; i < 8; i++) put(p[i], a[i]);
}
template <> INLINE void put_eight<float, float>(float *p, Eight<float> a) { store8(p, a); }
template <> INLINE void put_eight<double, double>(double *p, Eight<double> a) { store8(p, a); }

// 8 x 8 values transposed: pairs, then pairs of pairs, then halves.
template <class T> INLINE void transpose(Eight<T> (&a)[8]) {
    Eight<T> b[8];
    for (int i = 0; i < 8; i += 2) {
        b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = i; j < i + 2; j++) {
            a[j] = __builtin_shufflevector(b[j], b[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            a[j + 2] = __builtin_shufflevector(b[j], b[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        b[i + 4] = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int i = 0; i < 8; i++) a[i] = b[i];
}

// rows[r][i] = p[i * stride + r] for columns that lie together, by squares of 8 x 8. The last square of columns overlaps
// the one before it; where there are fewer than 8 columns it reads into the next pixels, as far as `there` pixels go.
template <class T, class In>
void load_columns(T *rows, int64_t width, const In *p, int64_t stride, int64_t n, int64_t there, int64_t R) {
    const int64_t beyond = R < 8 ? parts(8 - R, stride) : 0;
    int64_t i = 0;
    for (; i + 8 <= n && i + 8 + beyond <= there; i += 8)
        for (int64_t c = 0; c < R; c += 8) {
            const int64_t first = R < 8 ? 0 : least(c, R - 8), columns = least(8, R);
            Eight<T> a[8];
            for (int k = 0; k < 8; k++) a[k] = eight_of<T>(p + (i + k) * stride + first);
            transpose<T>(a);
            for (int k = 0; k < columns; k++) store8(rows + (first + k) * width + i, a[k]);
        }
    for (; i < n; i++)
        for (int64_t r = 0; r < R; r++) rows[r * width + i] = T(value_of(p[i * stride + r]));
}

// The way back, to pixels without a gap: with fewer than 8 columns a pixel is written over the one before it, and the
// last pixels one by one, because what comes behind them belongs to somebody else.
template <class T, class Out> void store_columns(Out *p, const T *rows, int64_t width, int64_t n, int64_t R) {
    const int64_t beyond = R < 8 ? parts(8 - R, R) : 0;
    int64_t i = 0;
    for (; i + 8 + beyond <= n; i += 8)
        for (int64_t c = 0; c < R; c += 8) {
            const int64_t first = R < 8 ? 0 : least(c, R - 8);
            Eight<T> a[8];
            for (int k = 0; k < 8; k++) a[k] = load8(rows + least(first + k, R - 1) * width + i);
            transpose<T>(a);
            for (int k = 0; k < 8; k++) put_eight<Out, T>(p + (i + k) * R + first, a[k]);
        }
    for (; i < n; i++)
        for (int64_t r = 0; r < R; r++) put(p[i * R + r], rows[r * width + i]);
}

// Pixels n0 to n0 + n of item b of P [B, N, R], as rows[R][width]; zeros up to `padded`.
template <class T>
void load_block(T *rows, int64_t width, const Tensor &P, int64_t b, int64_t n0, int64_t n, int64_t padded, int64_t N,
                int64_t R) {
    const int64_t stride_n = P.stride[1], stride_r = P.stride[2];
    if (stride_r == 1 && stride_n > 0 && R > 1)
        with_type(P, [&](auto *data) {
            load_columns(rows, width, data + P.at(b, n0, 0), stride_n, n, N - n0, R);
        });
    else
        for (int64_t r = 0; r < R; r++) load_row(rows + r * width, P, P.at(b, n0, r), stride_n, n, n);
    for (int64_t r = 0; r < R; r++)
        for (int64_t i = n; i < padded; i++) rows[r * width + i] = 0;
}

template <class T>
void store_block(const Tensor &P, const T *rows, int64_t width, int64_t b, int64_t n0, int64_t n, int64_t R) {
    if (P.stride[2] == 1 && P.stride[1] == R && R > 1)
        with_type(P, [&](auto *data) { store_columns(data + P.at(b, n0, 0), rows, width, n, R); });
    else
        for (int64_t r = 0; r < R; r++) store_row(P, P.at(b, n0, r), P.stride[1], rows + r * width, n);
}

} // namespace VARIANT
