// The residual in float64: where d is small, it is what is left of numbers hundreds of times its size.
#pragma once

#include "views.h"

namespace VARIANT {

// r[m] −= Σ_k v[m][k] P[k] of M samples, as many pixels at once as hide the latency of a sum.
template <class T, int M>
INLINE void subtract(double *r, const T *rows, int64_t width, int64_t n, const double *v, int64_t R) {
    constexpr int U = 4 / M;
    for (int64_t i = 0; i < n; i += 8 * U) {
        Eight<double> sums[M][U];
        for (int m = 0; m < M; m++)
            for (int u = 0; u < U; u++) sums[m][u] = load8(r + m * width + i + 8 * u);
        for (int64_t k = 0; k < R; k++)
            for (int u = 0; u < U; u++) {
                const Eight<double> p = eight_of<double>(rows + k * width + i + 8 * u);
                for (int m = 0; m < M; m++) sums[m][u] -= v[m * R + k] * p;
            }
        for (int m = 0; m < M; m++)
            for (int u = 0; u < U; u++) store8(r + m * width + i + 8 * u, sums[m][u]);
    }
}

// The residuals of `S` samples with coefficients v [S, R], in the place of δ.
template <class T>
void make_residuals(double *r, const T *rows, int64_t width, int64_t n, const double *v, int64_t R, int64_t S) {
    int64_t s = 0;
    for (; s + 4 <= S; s += 4) subtract<T, 4>(r + s * width, rows, width, n, v + s * R, R);
    for (; s + 3 <= S; s += 3) subtract<T, 3>(r + s * width, rows, width, n, v + s * R, R);
    for (; s + 2 <= S; s += 2) subtract<T, 2>(r + s * width, rows, width, n, v + s * R, R);
    for (; s < S; s++) subtract<T, 1>(r + s * width, rows, width, n, v + s * R, R);
}

// z = D⁻¹r in the precision of the products, zeros up to `padded`, and rᵀz. Without float64 products r is what is kept.
template <class T> double scale(T *z, const double *r, const T *d_inv, int64_t n, int64_t padded) {
    Eight<double> q = {};
    for (int64_t i = n; i < padded; i++) z[i] = 0;
    for (int64_t i = 0; i < n; i++) z[i] = T(r[i]) * d_inv[i];
    for (int64_t i = 0; i + 8 <= n; i += 8) {
        const Eight<double> square = load8(r + i) * load8(r + i);
        q += square * eight_of<double>(d_inv + i);
    }
    for (int64_t i = n / 8 * 8; i < n; i++) q[i % 8] += r[i] * r[i] * double(d_inv[i]);
    return total(q);
}

} // namespace VARIANT
