// What the passes over a dense factor share: the calls as Python packs them.
#pragma once

#include "../../../device/csrc/blocks.h"
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
    int64_t given;     // L_inv, logdet and wide are known
    double *gram, *w;       // [B, R, R], [S, B, R]; outputs are not wanted where null
    double *L_inv, *logdet; // [B, R, R], [B]
    uint8_t *wide, *rough;  // [B]: made with products in float64; and not even these are good enough
    double *q, *v, *step;  // [S, B], [S, B, R], [S, B, R]
    char *residual;        // [S, B, N], float64 if in_double, else float32
};

struct Backward {
    int64_t S, B, N, R, threads;
    Tensor x, loc, P, d; // x and loc for their dtypes alone
    int64_t one_d, in_double, loc_samples;
    const double *a, *b; // gradients of q [S, B] and of log|Σ| [B]
    const double *L_inv, *v, *step;
    const uint8_t *wide;
    Tensor residual;
    Tensor grad_x, grad_loc, grad_P, grad_d; // not wanted where null
    uint8_t *doubtful;                       // [B]: an item whose gradients are to be made with more care
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
    Tensor grad_P, grad_d, grad_omega_d; // not wanted where null
};

constexpr double EPS = 0x1p-52;
// As `capacitance.GOOD_ENOUGH`: the largest ε Cⱼⱼ C⁻¹ⱼⱼ of a C that is made of P itself, for results in the dtype.
INLINE double good_enough(bool in_double) { return in_double ? 1e-8 : 1e-5; }

// As in leverage.py: below the first, 1 − h is made again; the error of a sum of leverages that float64 may leave; and
// where every C⁻¹ⱼⱼ is below the third, P says much in all directions.
constexpr double SMALL = 0.1, TOLERANCE = 1e-7, INFORMED = 1e-4;

// Items of few pixels: up to so many columns, and values of P.
constexpr int64_t MOST_COLUMNS = 8, MOST_VALUES = 256;
template <class Call> INLINE bool of_few(const Call &call) {
    return call.R <= MOST_COLUMNS && call.N * call.R <= MOST_VALUES;
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

// few.cpp: the passes over items of few pixels; the first two are for one sample at most, and return how many items are
// rough, or doubtful.
int64_t forward_of_few(const Forward &call);
int64_t backward_of_few(const Backward &call);
int64_t samples_of_few(const Samples &call);
int64_t samples_backward_of_few(const SamplesBackward &call);

// backward.cpp
struct Remainder {
    double least, sum; // of 1 − h
    double grad_d;     // what q contributes, where d is one value
};
template <class T>
Remainder go_back(const Backward &call, const double *C_inv, int64_t b, int64_t from, int64_t to);

// What the library offers: forward.cpp, passes.cpp. The first two return how many items are rough, or doubtful.
int64_t forward(const Forward &call);
int64_t backward(const Backward &call);
int64_t samples(const Samples &call);
int64_t samples_backward(const SamplesBackward &call);

// sampling.cpp
template <class T> void sample(const Samples &call, int64_t b, int64_t from, int64_t to, int64_t s0, int64_t s1);
template <class T> double sample_backward(const SamplesBackward &call, int64_t b, int64_t from, int64_t to);

} // namespace VARIANT
