// How the passes over pixels are cut.
//
// A block is a few hundred pixels, brought to rows of pixels in the first-level cache whatever the layout in memory. A
// chunk is what one unit of work goes over; sums over pixels are made chunk by chunk, and added up in their order.
#pragma once

#include "vectors.h"

namespace VARIANT {

// Up to so many columns the sums of a block stay vectors, which are added up once a chunk; beyond, they would leave the
// cache, and blocks are larger so that adding up lanes is a small part.
constexpr int64_t FEW_COLUMNS = 32;
// Samples that one unit takes.
constexpr int64_t GROUP = 32;

template <class T> INLINE int64_t block_pixels(int64_t R) { return (R <= FEW_COLUMNS ? 1024 : 2048) / sizeof(T); }

// Rows are padded, because rows a power of two apart share few places in the cache.
template <class T> INLINE int64_t row_width(int64_t R) { return block_pixels<T>(R) + 64 / sizeof(T); }

// Pixels of a chunk: many enough that sums of R² numbers are a small part of what is read.
INLINE int64_t chunk_pixels(int64_t R) { return 4096 * parts(R, 256); }

// Calls f(n0, n, padded) for the blocks of pixels `from` to `to`.
template <class T, class F> INLINE void for_blocks(int64_t from, int64_t to, int64_t R, const F &f) {
    const int64_t step = block_pixels<T>(R);
    for (int64_t n0 = from; n0 < to; n0 += step) {
        const int64_t n = least(step, to - n0);
        f(n0, n, up_to_multiple(n, LANES<T>));
    }
}

} // namespace VARIANT
