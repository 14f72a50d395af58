// Sums of rows, Σ_k c[m][k] row[k]: what a matrix times P is, where pixels lie along the rows.
#pragma once

#include "vectors.h"

namespace VARIANT {

// Coefficients c[m][k] = at[m * row + k * column].
template <class T> struct Matrix {
    const T *at;
    int64_t row, column;
};

template <class T, int M, int U, class F>
INLINE void product_tile(const Matrix<T> &c, int64_t m0, const T *rows, int64_t width, int64_t K, int64_t i, const F &f) {
    Vec<T> sums[M][U] = {};
    for (int64_t k = 0; k < K; k++)
        for (int m = 0; m < M; m++) {
            const T factor = c.at[(m0 + m) * c.row + k * c.column];
            for (int u = 0; u < U; u++) sums[m][u] += factor * load(rows + k * width + i + u * LANES<T>);
        }
    for (int u = 0; u < U; u++) {
        Vec<T> column[M];
        for (int m = 0; m < M; m++) column[m] = sums[m][u];
        f(m0, i + u * LANES<T>, column);
    }
}

template <class T, int M, int U, class F>
INLINE void product_tiles(const Matrix<T> &c, int64_t m0, int64_t count, const T *rows, int64_t width, int64_t K,
                          int64_t i, const F &f) {
    for (; m0 + M <= count; m0 += M) product_tile<T, M, U>(c, m0, rows, width, K, i, f);
    if constexpr (M > 1) product_tiles<T, M - 1, U>(c, m0, count, rows, width, K, i, f);
}

// f(m, i, sums) with the sums m, m + 1, ... of some pixels, for all m < count and all vectors i of `n` pixels, a multiple
// of the lanes. Pixels are the outer loop, so that a few vectors of every row stay in the first-level cache.
template <class T, class F>
INLINE void products(const Matrix<T> &c, int64_t count, const T *rows, int64_t width, int64_t K, int64_t n, const F &f) {
    int64_t i = 0;
    for (; i + TILE_VECTORS * LANES<T> <= n; i += TILE_VECTORS * LANES<T>)
        product_tiles<T, TILE, TILE_VECTORS>(c, 0, count, rows, width, K, i, f);
    for (; i < n; i += LANES<T>) product_tiles<T, TILE, 1>(c, 0, count, rows, width, K, i, f);
}

// The number of sums that f is given.
template <class V, int M> constexpr int count_of(const V (&)[M]) { return M; }

} // namespace VARIANT
