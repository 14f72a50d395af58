// The functions of the library, one table for each variant that the sources are compiled as.
#pragma once

#include <cstdint>

// A function takes a call as Python packs it, and returns how many items it is not sure of.
using Pass = int64_t (*)(const void *call);

struct Passes {
    Pass dense_forward, dense_backward, dense_samples, dense_samples_backward, linear_residual;
    Pass stencil_product, stencil_backward, stencil_solve;
};

namespace baseline { extern const Passes passes; }
namespace avx2 { extern const Passes passes; }
namespace avx512 { extern const Passes passes; }
