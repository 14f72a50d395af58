// The functions of the library, one table for each variant that the sources are compiled as.
#pragma once

// A function takes a call as Python packs it.
using Pass = void (*)(const void *call);

struct Passes {
    Pass dense_forward, dense_backward, dense_samples, dense_samples_backward;
    Pass stencil_product, stencil_backward, stencil_solve;
};

namespace baseline { extern const Passes passes; }
namespace avx2 { extern const Passes passes; }
namespace avx512 { extern const Passes passes; }
