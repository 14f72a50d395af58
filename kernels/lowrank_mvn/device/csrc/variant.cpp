// The table of one variant.
#include "variants.h"

#include "../../factors/dense/cpu/dense.h"
#include "../../factors/linear/cpu/linear.h"
#include "../../local/stencil/cpu/stencil.h"

namespace VARIANT {

template <class Call, int64_t (*function)(const Call &)> static int64_t pass(const void *call) {
    return function(*static_cast<const Call *>(call));
}

extern const Passes passes = {
    pass<Forward, forward>,
    pass<Backward, backward>,
    pass<Samples, samples>,
    pass<SamplesBackward, samples_backward>,
    pass<LinearResidual, linear_residual>,
    pass<stencil::Product, stencil::product>,
    pass<stencil::ProductBackward, stencil::product_backward>,
    pass<stencil::Solve, stencil::solve>,
};

} // namespace VARIANT
