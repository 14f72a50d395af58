// Pass 2: the residual r = δ − Pv of a chunk of pixels, q(v) = rᵀD⁻¹r and PᵀD⁻¹r.
//
// Where d is small, r is what is left of numbers hundreds of times its size: it is made in float64 and rounded once.
#include "../../../device/csrc/exact.h"
#include "../../../device/csrc/sums.h"
#include "dense.h"

namespace VARIANT {
namespace {

thread_local Scratch scratch;

} // namespace

template <class T, class Out>
void leave_residual(const Forward &call, int64_t b, int64_t from, int64_t to, int64_t s0, int64_t s1, double *q,
                    double *g) {
    const int64_t R = call.R, S = s1 - s0, width = row_width<T>(R), places = Sums<T>::places(R, S, false);
    scratch.reserve(Scratch::bytes<T>((R + S + 1) * width) + Scratch::bytes<double>((S + 1) * width) +
                    Scratch::bytes<double>(S * R) + Scratch::bytes<Vec<T>>(places));
    T *rows = scratch.take<T>((R + S + 1) * width), *d_inv = rows + (R + S) * width;
    double *r = scratch.take<double>((S + 1) * width), *loc = r + S * width, *v = scratch.take<double>(S * R);
    Sums<T> made(R, S, false, g - R * (R + 1) / 2, scratch.take<Vec<T>>(places));
    for (int64_t s = 0; s < S; s++) {
        memcpy(v + s * R, call.v + ((s0 + s) * call.B + b) * R, sizeof(double) * R);
        q[s] = 0;
        for (int64_t k = 0; k < R; k++) g[s * R + k] = 0;
    }
    for_blocks<T>(from, to, R, [&](int64_t n0, int64_t n, int64_t padded) {
        const int64_t whole = up_to_multiple(n, 32);
        load_block(rows, width, call.P, b, n0, n, most(whole, padded), call.N, R);
        load_row(d_inv, call.d, call.d.at(0, b, call.one_d ? 0 : n0), call.one_d ? 0 : call.d.stride[2], n, n);
        for (int64_t i = 0; i < n; i++) d_inv[i] = 1 / d_inv[i];
        for (int64_t s = 0; s < S; s++) {
            double *delta = r + s * width;
            load_row(delta, call.x, call.x.at(s0 + s, b, n0), call.x.stride[2], n, whole);
            load_row(loc, call.loc, call.loc.at(s0 + s, b, n0), call.loc.stride[2], n, whole);
            for (int64_t i = 0; i < n; i++) delta[i] -= loc[i];
        }
        make_residuals(r, rows, width, whole, v, R, S);
        for (int64_t s = 0; s < S; s++) {
            Out *kept = (Out *)call.residual + ((s0 + s) * call.B + b) * call.N + n0;
            for (int64_t i = 0; i < n; i++) kept[i] = Out(r[s * width + i]);
            q[s] += scale(rows + (R + s) * width, r + s * width, d_inv, n, padded);
        }
        made.add(rows, width, padded);
    });
    made.finish();
}

template void leave_residual<float, float>(const Forward &, int64_t, int64_t, int64_t, int64_t, int64_t, double *,
                                           double *);
template void leave_residual<double, float>(const Forward &, int64_t, int64_t, int64_t, int64_t, int64_t, double *,
                                            double *);
template void leave_residual<double, double>(const Forward &, int64_t, int64_t, int64_t, int64_t, int64_t, double *,
                                             double *);

} // namespace VARIANT
