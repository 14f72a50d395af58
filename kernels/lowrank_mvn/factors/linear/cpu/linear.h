// What the passes over a linear factor share: the calls as Python packs them.
#pragma once

#include "../../../device/csrc/blocks.h"
#include "../../../device/csrc/pool.h"
#include "../../../device/csrc/scratch.h"
#include "../../../device/csrc/views.h"

namespace VARIANT {

// A row is a channel of a sample. Tensors have strides (s, b, n), or F (b, n, k); those of channels stand apart.
struct LinearResidual {
    int64_t S, B, channels, pixels, K, threads;
    Tensor x, loc, F, d; // loc may be null
    int64_t x_channel, loc_channel, d_channel;
    int64_t one_d, in_double;
    const double *u; // [B, S * channels, K + 1], with the mean that is linear in the features
    const uint8_t *wide;
    char *residual;  // [S, B, channels, pixels], float64 if in_double, else float32
    double *zF, *rz; // [B, S * channels, K + 1], [B, S * channels]
};

int64_t linear_residual(const LinearResidual &call);

} // namespace VARIANT
