// The table of one variant.
#include "variants.h"

#include "../../factors/dense/cpu/dense.h"
#include "../../local/stencil/cpu/stencil.h"

namespace VARIANT {

template <class Call, void (*function)(const Call &)> static void pass(const void *call) {
    function(*static_cast<const Call *>(call));
}

extern const Passes passes = {
    pass<Forward, forward>,
    pass<Backward, backward>,
    pass<Samples, samples>,
    pass<SamplesBackward, samples_backward>,
    pass<stencil::Product, stencil::product>,
    pass<stencil::ProductBackward, stencil::product_backward>,
    pass<stencil::Solve, stencil::solve>,
};

} // namespace VARIANT
