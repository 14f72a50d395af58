// What Python calls. Each function takes a call as Python packs it, and returns how many items it is not sure of, or −1
// where there is no memory.
#include <cstring>
#include <new>

#include "variants.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Variant {
    const char *name;
    bool (*runs)();
    const Passes &passes;
};

// Widest first. The baseline is what every processor of the platform has.
const Variant VARIANTS[] = {
#ifdef HAS_X86_VARIANTS
    {"avx512", [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
     }, avx512::passes},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2::passes},
#endif
    {"baseline", [] { return true; }, baseline::passes},
};

const Variant *widest() {
    for (const Variant &variant : VARIANTS)
        if (variant.runs()) return &variant;
    return nullptr; // not reached: the baseline runs
}

const Variant *chosen = widest();

int64_t guarded(Pass pass, const void *call) {
    try {
        return pass(call);
    } catch (const std::bad_alloc &) {
        return -1;
    }
}

} // namespace

EXPORT const char *lowrank_variant() { return chosen->name; }

// Takes another variant, for tests; 1 where this processor, or this library, does not have it.
EXPORT int lowrank_use_variant(const char *name) {
    for (const Variant &variant : VARIANTS)
        if (!std::strcmp(variant.name, name) && variant.runs()) {
            chosen = &variant;
            return 0;
        }
    return 1;
}

EXPORT int64_t lowrank_dense_forward(const void *call) { return guarded(chosen->passes.dense_forward, call); }
EXPORT int64_t lowrank_dense_backward(const void *call) { return guarded(chosen->passes.dense_backward, call); }
EXPORT int64_t lowrank_dense_samples(const void *call) { return guarded(chosen->passes.dense_samples, call); }
EXPORT int64_t lowrank_dense_samples_backward(const void *call) {
    return guarded(chosen->passes.dense_samples_backward, call);
}
EXPORT int64_t lowrank_linear_residual(const void *call) { return guarded(chosen->passes.linear_residual, call); }
EXPORT int64_t lowrank_stencil_product(const void *call) { return guarded(chosen->passes.stencil_product, call); }
EXPORT int64_t lowrank_stencil_backward(const void *call) { return guarded(chosen->passes.stencil_backward, call); }
EXPORT int64_t lowrank_stencil_solve(const void *call) { return guarded(chosen->passes.stencil_solve, call); }
