// Pass 1: the sums PᵀD⁻¹P, w = PᵀD⁻¹δ and log|D| of a chunk of pixels.
//
// P and δ are brought to rows and scaled by D^-1/2; then all are sums of products of two rows.
#include <cmath>

#include "../../../device/csrc/logarithm.h"
#include "../../../device/csrc/sums.h"
#include "dense.h"

namespace VARIANT {
namespace {

thread_local Scratch scratch;

// D^-1/2 of a block.
template <class T> void roots(T *scale, int64_t n, bool inverted) {
    if (inverted)
        for (int64_t i = 0; i < n; i++) scale[i] = std::sqrt(scale[i]);
    else
        for (int64_t i = 0; i < n; i++) scale[i] = 1 / std::sqrt(scale[i]);
}

template <class T> void multiply_rows(T *rows, int64_t count, int64_t width, const T *scale, int64_t n) {
    for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < n; i += LANES<T>) {
            T *at = rows + r * width + i;
            store(at, load(at) * load(scale + i));
        }
}

template <class T>
void sums(const Forward &call, int64_t b, int64_t from, int64_t to, int64_t s0, int64_t s1, bool triangle,
          double *out) {
    const int64_t R = call.R, S = s1 - s0, width = row_width<T>(R), places = Sums<T>::places(R, S, triangle);
    scratch.reserve(Scratch::bytes<T>((R + S) * width) + 2 * Scratch::bytes<double>(width) +
                    Scratch::bytes<Vec<T>>(places));
    T *rows = scratch.take<T>((R + S) * width), *scale = (T *)scratch.take<double>(width);
    double *d = scratch.take<double>(width);
    Sums<T> made(R, S, triangle, out, scratch.take<Vec<T>>(places));
    Logarithm log_D;
    const bool logarithm = triangle && !call.one_d && !call.inverted;
    for_blocks<T>(from, to, R, [&](int64_t n0, int64_t n, int64_t padded) {
        load_block(rows, width, call.P, b, n0, n, padded, call.N, R);
        for (int64_t s = s0; s < s1; s++) {
            T *delta = rows + (R + s - s0) * width, *loc = scale;
            load_row(delta, call.x, call.x.at(s, b, n0), call.x.stride[2], n, padded);
            load_row(loc, call.loc, call.loc.at(s, b, n0), call.loc.stride[2], n, padded);
            for (int64_t i = 0; i < padded; i++) delta[i] -= loc[i];
        }
        if (!call.one_d) {
            load_row(scale, call.d, call.d.at(0, b, n0), call.d.stride[2], n, n);
            for (int64_t i = n; i < padded; i++) scale[i] = 1;
            if (logarithm) {
                load_row(d, call.d, call.d.at(0, b, n0), call.d.stride[2], n, n);
                for (int64_t i = n; i < up_to_multiple(n, 8); i++) d[i] = 1;
                for (int64_t i = 0; i < n; i += 8) log_D.multiply(load8(d + i));
            }
            roots(scale, padded, call.inverted);
            multiply_rows(rows, R + S, width, scale, padded);
        }
        made.add(rows, width, padded);
    });
    made.finish();
    if (logarithm) out[R * (R + 1) / 2 + S * R] = log_D.total();
}

} // namespace

template <class T> void add_up(const Forward &call, int64_t b, int64_t from, int64_t to, int64_t samples, double *out) {
    sums<T>(call, b, from, to, 0, samples, true, out);
}

template <class T>
void project(const Forward &call, int64_t b, int64_t from, int64_t to, int64_t s0, int64_t s1, double *w) {
    sums<T>(call, b, from, to, s0, s1, false, w - call.R * (call.R + 1) / 2);
}

template void add_up<float>(const Forward &, int64_t, int64_t, int64_t, int64_t, double *);
template void add_up<double>(const Forward &, int64_t, int64_t, int64_t, int64_t, double *);
template void project<float>(const Forward &, int64_t, int64_t, int64_t, int64_t, int64_t, double *);
template void project<double>(const Forward &, int64_t, int64_t, int64_t, int64_t, int64_t, double *);

} // namespace VARIANT
