// What the passes over a dense factor share: the call as Python packs it, and how it is cut.
//
// A block is a few hundred pixels, brought to rows P[r][pixel] in the first-level cache whatever the layout of P. A
// chunk is what one unit of work goes over; sums over pixels are made chunk by chunk, and added up in their order.
#pragma once

#include "../../../device/csrc/pool.h"
#include "../../../device/csrc/scratch.h"
#include "../../../device/csrc/views.h"

namespace VARIANT {

// Tensors have strides (s, b, n), P (b, n, r); outputs are contiguous.
struct Forward {
    int64_t S, B, N, R, threads;
    Tensor x, loc, P, d;
    int64_t one_d;    // d has one value for all pixels of an item
    int64_t inverted; // d is the diagonal of D⁻¹
    int64_t in_double; // products in float64 for every item; else for those that float32 is too rough for
    int64_t given;    // C_inv, logdet and wide are known
    double *gram, *w;      // [B, R, R], [S, B, R]; not wanted where null, and nothing else is where given
    double *C_inv, *logdet; // [B, R, R], [B]
    uint8_t *wide;         // [B]
    double *q, *v, *step;  // [S, B], [S, B, R], [S, B, R]
    char *residual;        // [S, B, N], float64 if in_double, else float32
};

struct Backward {
    int64_t S, B, N, R, threads;
    Tensor x, loc, P, d; // x and loc for their dtypes alone
    int64_t one_d, in_double, loc_samples;
    const double *a, *b; // gradients of q [S, B] and of log|Σ| [B]
    const double *C_inv, *v, *step;
    const uint8_t *wide;
    Tensor residual;
    Tensor grad_x, grad_loc, grad_P, grad_d; // not wanted where null; grad_d float64 where d is one value
    double *least, *rest;                    // [B]: the least 1 − hₙ, and their sum, where grad_d is wanted per pixel
};

struct Samples {
    int64_t S, B, N, R, threads;
    Tensor loc, P, d, omega_p, omega_d;
    int64_t one_d, in_double;
    Tensor y;
};

struct SamplesBackward {
    int64_t S, B, N, R, threads;
    Tensor grad_y, P, d, omega_p, omega_d;
    int64_t one_d, in_double;
    Tensor grad_P, grad_d, grad_omega_d; // not wanted where null; grad_d float64 where d is one value
};

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

// --- The passes. Each is in the file of its name. ----------------------------------------------------------------------

// capacitance.cpp: the sums of a chunk for the first `samples` samples: lower half of PᵀD⁻¹P, w [samples, R], log|D|.
INLINE int64_t sums_size(int64_t R, int64_t samples) { return R * (R + 1) / 2 + samples * R + 1; }
template <class T>
void add_up(const Forward &call, int64_t b, int64_t from, int64_t to, int64_t samples, double *sums);
// w of the samples s0 to s1 alone.
template <class T>
void project(const Forward &call, int64_t b, int64_t from, int64_t to, int64_t s0, int64_t s1, double *w);

// residual.cpp: r, and the sums rᵀD⁻¹r [s1 − s0] and PᵀD⁻¹r [s1 − s0, R].
template <class T, class Out>
void leave_residual(const Forward &call, int64_t b, int64_t from, int64_t to, int64_t s0, int64_t s1, double *q,
                    double *g);

// backward.cpp
struct Remainder {
    double least, sum; // of 1 − h
    double grad_d;     // what q contributes, where d is one value
};
template <class T> Remainder go_back(const Backward &call, int64_t b, int64_t from, int64_t to);

// What the library offers: forward.cpp, passes.cpp.
void forward(const Forward &call);
void backward(const Backward &call);
void samples(const Samples &call);
void samples_backward(const SamplesBackward &call);

// sampling.cpp
template <class T> void sample(const Samples &call, int64_t b, int64_t from, int64_t to, int64_t s0, int64_t s1);
template <class T> double sample_backward(const SamplesBackward &call, int64_t b, int64_t from, int64_t to);

} // namespace VARIANT
