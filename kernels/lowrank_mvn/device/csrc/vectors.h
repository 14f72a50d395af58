// Vectors of the compiler's own types, as wide as the processor's registers. Each source of a pass is compiled once for
// each VARIANT (setup.py), in a namespace of that name, so that one library serves every processor.
#pragma once

#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

namespace VARIANT {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, TILE = 5, TILE_VECTORS = 4; // 25 sums, or 5 x 4 products, of 32 registers
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, TILE = 3, TILE_VECTORS = 3; // 9 of 16 registers
#else
constexpr int VECTOR_BYTES = 16, TILE = 3, TILE_VECTORS = 3;
#endif

template <class T> struct Vectors {
    typedef T type __attribute__((vector_size(VECTOR_BYTES)));
    typedef T loose __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};
template <class T> using Vec = typename Vectors<T>::type;
template <class T> constexpr int LANES = VECTOR_BYTES / sizeof(T);

// Eight values, whatever their type: what is transposed and converted at once.
template <class T> struct Eights {
    typedef T type __attribute__((vector_size(8 * sizeof(T))));
    typedef T loose __attribute__((vector_size(8 * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <class T> using Eight = typename Eights<T>::type;

template <class T> INLINE Vec<T> load(const T *p) { return *(const typename Vectors<T>::loose *)p; }
template <class T> INLINE void store(T *p, Vec<T> a) { *(typename Vectors<T>::loose *)p = a; }
template <class T> INLINE Eight<T> load8(const T *p) { return *(const typename Eights<T>::loose *)p; }
template <class T> INLINE void store8(T *p, Eight<T> a) { *(typename Eights<T>::loose *)p = a; }

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t up_to_multiple(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
INLINE int64_t parts(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The sum of the lanes in float64, always in the same order.
INLINE double total(Eight<double> a) {
    const Eight<double> fours = a + __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3);
    return (fours[0] + fours[1]) + (fours[2] + fours[3]);
}
template <class T> INLINE double sum_of_lanes(Vec<T> a) {
    T lanes[LANES<T>];
    store(lanes, a);
    Eight<double> eights = {};
    if constexpr (LANES<T> >= 8)
        for (int i = 0; i < LANES<T>; i += 8) eights += __builtin_convertvector(load8(lanes + i), Eight<double>);
    else
        for (int i = 0; i < LANES<T>; i++) eights[i] = double(lanes[i]);
    return total(eights);
}

} // namespace VARIANT
