// Sums over pixels of products of two rows: PᵀP and Pᵀδ, without the scales.
//
// A tile of sums, up to TILE rows by TILE rows, stays in registers for a block; the lower half of PᵀP is made of such
// tiles, and so is δᵀP. The sum of a lane goes over a chunk in the precision of the rows (256 terms in float32, with
// vectors of 16); lanes and chunks are added in float64.
#pragma once

#include "blocks.h"

namespace VARIANT {

template <class T, int M, int K>
static void tile(const T *a, const T *b, int64_t width, int64_t n, Vec<T> *kept) {
    Vec<T> sums[M][K] = {};
    for (int64_t i = 0; i < n; i += LANES<T>) {
        Vec<T> left[M];
        for (int m = 0; m < M; m++) left[m] = load(a + m * width + i);
        for (int k = 0; k < K; k++) {
            const Vec<T> right = load(b + k * width + i);
            for (int m = 0; m < M; m++) sums[m][k] += left[m] * right;
        }
    }
    for (int m = 0; m < M; m++)
        for (int k = 0; k < K; k++) kept[m * K + k] += sums[m][k];
}

template <class T> using Tile = void (*)(const T *, const T *, int64_t, int64_t, Vec<T> *);
template <class T, int M = TILE, int K = TILE> INLINE Tile<T> tile_of(int64_t rows, int64_t columns) {
    if constexpr (M > 1)
        if (rows < M) return tile_of<T, M - 1, K>(rows, columns);
    if constexpr (K > 1)
        if (columns < K) return tile_of<T, M, K - 1>(rows, columns);
    return tile<T, M, K>;
}

// Calls f(i, M, j, K) for the tiles of rows i and j: the lower half of the first R rows, and S more against these.
template <class F> INLINE void for_tiles(int64_t R, int64_t S, bool triangle, const F &f) {
    for (int64_t i = 0; triangle && i < R; i += TILE)
        for (int64_t j = 0; j <= i; j += TILE) f(i, least(TILE, R - i), j, least(TILE, R - j));
    for (int64_t i = R; i < R + S; i += TILE)
        for (int64_t j = 0; j < R; j += TILE) f(i, least(TILE, R + S - i), j, least(TILE, R - j));
}

INLINE int64_t place(int64_t i, int64_t j, int64_t R) {
    return i < R ? i * (i + 1) / 2 + j : R * (R + 1) / 2 + (i - R) * R + j;
}

// The sums of a chunk, block by block; `triangle` says whether PᵀD⁻¹P is among them.
template <class T> struct Sums {
    const int64_t R, S;
    const bool triangle, few;
    double *out;
    Vec<T> *kept;

    Sums(int64_t R, int64_t S, bool triangle, double *out, Vec<T> *kept)
        : R(R), S(S), triangle(triangle), few(are_few(R, S, triangle)), out(out), kept(kept) {
        clear(places(R, S, triangle));
    }
    // Places of `kept`.
    static int64_t places(int64_t R, int64_t S, bool triangle) {
        const int64_t of_triangle = triangle ? (R + TILE) * (R + TILE) : 0;
        return are_few(R, S, triangle) ? of_triangle + S * R : TILE * TILE;
    }
    static bool are_few(int64_t R, int64_t S, bool triangle) {
        return S * R <= FEW_COLUMNS * FEW_COLUMNS && (R <= FEW_COLUMNS || !triangle);
    }
    void clear(int64_t count) {
        for (int64_t i = 0; i < count; i++) kept[i] = Vec<T>{};
    }
    void flush(const Vec<T> *tile, int64_t i, int64_t M, int64_t j, int64_t K) {
        for (int64_t m = 0; m < M; m++)
            for (int64_t k = 0; k < K; k++)
                if (i >= R || j + k <= i + m) out[place(i + m, j + k, R)] += sum_of_lanes<T>(tile[m * K + k]);
    }
    void add(const T *rows, int64_t width, int64_t n) {
        Vec<T> *next = kept;
        for_tiles(R, S, triangle, [&](int64_t i, int64_t M, int64_t j, int64_t K) {
            if (!few) clear(M * K);
            tile_of<T>(M, K)(rows + i * width, rows + j * width, width, n, next);
            if (few) next += M * K;
            else flush(next, i, M, j, K);
        });
    }
    void finish() {
        Vec<T> *next = kept;
        if (few)
            for_tiles(R, S, triangle, [&](int64_t i, int64_t M, int64_t j, int64_t K) {
                flush(next, i, M, j, K);
                next += M * K;
            });
    }
};

} // namespace VARIANT
