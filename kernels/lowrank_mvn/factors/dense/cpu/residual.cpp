// Pass 2: the residual r = δ − Pv of a chunk of pixels, q(v) = rᵀD⁻¹r and PᵀD⁻¹r.
//
// Where d is small, r is what is left of numbers hundreds of times its size: it is made in float64 and rounded once.
#include "dense.h"
#include "sums.h"

namespace VARIANT {
namespace {

thread_local Scratch scratch;

// r[m] −= Σ_k v[m][k] P[k] of M samples, as many pixels at once as hide the latency of a sum.
template <class T, int M> void subtract(double *r, const T *rows, int64_t width, int64_t n, const double *v, int64_t R) {
    constexpr int U = 4 / M;
    for (int64_t i = 0; i < n; i += 8 * U) {
        Eight<double> sums[M][U];
        for (int m = 0; m < M; m++)
            for (int u = 0; u < U; u++) sums[m][u] = load8(r + m * width + i + 8 * u);
        for (int64_t k = 0; k < R; k++)
            for (int u = 0; u < U; u++) {
                const Eight<double> p = eight_of<double>(rows + k * width + i + 8 * u);
                for (int m = 0; m < M; m++) sums[m][u] -= v[m * R + k] * p;
            }
        for (int m = 0; m < M; m++)
            for (int u = 0; u < U; u++) store8(r + m * width + i + 8 * u, sums[m][u]);
    }
}

// The residuals of `S` samples with coefficients v [S, R], in the place of δ.
template <class T>
void make_residuals(double *r, const T *rows, int64_t width, int64_t n, const double *v, int64_t R, int64_t S) {
    int64_t s = 0;
    for (; s + 4 <= S; s += 4) subtract<T, 4>(r + s * width, rows, width, n, v + s * R, R);
    for (; s + 2 <= S; s += 2) subtract<T, 2>(r + s * width, rows, width, n, v + s * R, R);
    for (; s < S; s++) subtract<T, 1>(r + s * width, rows, width, n, v + s * R, R);
}

// z = D⁻¹r in the precision of the products, zeros up to `padded`, and rᵀz. Without float64 products r is what is kept.
template <class T> double scale(T *z, const double *r, const T *d_inv, int64_t n, int64_t padded) {
    Eight<double> q = {};
    for (int64_t i = n; i < padded; i++) z[i] = 0;
    for (int64_t i = 0; i < n; i++) z[i] = T(r[i]) * d_inv[i];
    for (int64_t i = 0; i + 8 <= n; i += 8) {
        const Eight<double> square = load8(r + i) * load8(r + i);
        q += square * eight_of<double>(d_inv + i);
    }
    for (int64_t i = n / 8 * 8; i < n; i++) q[i % 8] += r[i] * r[i] * double(d_inv[i]);
    return total(q);
}

} // namespace

template <class T, class Out>
void leave_residual(const Forward &call, int64_t b, int64_t from, int64_t to, int64_t s0, int64_t s1, double *q,
                    double *g) {
    const int64_t R = call.R, S = s1 - s0, width = row_width<T>(R), places = Sums<T>::places(R, S);
    scratch.reserve(Scratch::bytes<T>((R + S + 1) * width) + Scratch::bytes<double>((S + 1) * width) +
                    Scratch::bytes<double>(S * R) + Scratch::bytes<Vec<T>>(places));
    T *rows = scratch.take<T>((R + S + 1) * width), *d_inv = rows + (R + S) * width;
    double *r = scratch.take<double>((S + 1) * width), *loc = r + S * width, *v = scratch.take<double>(S * R);
    Sums<T> made{R, S, false, Sums<T>::are_few(R, S), g - R * (R + 1) / 2, scratch.take<Vec<T>>(places)};
    made.clear(places);
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
