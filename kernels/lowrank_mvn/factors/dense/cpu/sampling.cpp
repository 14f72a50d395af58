// Samples y = μ + Pω_p + √d ω_d from given noise, and their gradients, over some pixels of an item:
//
//     grad_P = Σ_s grad_y ω_pᵀ        grad_d = Σ_s grad_y ω_d / (2√d)        grad_ω_d = √d grad_y
#include <cmath>

#include "../../../device/csrc/products.h"
#include "dense.h"

namespace VARIANT {
namespace {

thread_local Scratch scratch;

// √d of a block, zeros up to `padded`.
template <class T>
void load_root(T *root, const Tensor &d, bool one_d, int64_t b, int64_t n0, int64_t n, int64_t padded) {
    load_row(root, d, d.at(0, b, one_d ? 0 : n0), one_d ? 0 : d.stride[2], n, padded);
    for (int64_t i = 0; i < n; i++) root[i] = std::sqrt(root[i]);
}

// ω_p of the samples s0 to s0 + count.
template <class T> void load_omega(T *omega, const Tensor &omega_p, int64_t b, int64_t s0, int64_t count, int64_t R) {
    for (int64_t s = 0; s < count; s++)
        load_row(omega + s * R, omega_p, omega_p.at(s0 + s, b, 0), omega_p.stride[2], R, R);
}

} // namespace

template <class T> void sample(const Samples &call, int64_t b, int64_t from, int64_t to, int64_t s0, int64_t s1) {
    const int64_t R = call.R, S = s1 - s0, width = row_width<T>(1);
    scratch.reserve(Scratch::bytes<T>((R + S + 3) * width) + Scratch::bytes<T>(S * R));
    T *P = scratch.take<T>((R + S + 3) * width), *omega = scratch.take<T>(S * R);
    T *y = P + R * width, *root = y + S * width, *loc = root + width, *noise = loc + width;
    load_omega(omega, call.omega_p, b, s0, S, R);
    for_blocks<T>(from, to, 1, [&](int64_t n0, int64_t n, int64_t padded) {
        load_block(P, width, call.P, b, n0, n, padded, call.N, R);
        load_root(root, call.d, call.one_d, b, n0, n, padded);
        products(Matrix<T>{omega, R, 1}, S, P, width, R, padded,
                 [&](int64_t s, int64_t i, const auto &sums) {
                     for (int m = 0; m < count_of(sums); m++) store(y + (s + m) * width + i, sums[m]);
                 });
        for (int64_t s = 0; s < S; s++) {
            load_row(loc, call.loc, call.loc.at(s0 + s, b, n0), call.loc.stride[2], n, n);
            load_row(noise, call.omega_d, call.omega_d.at(s0 + s, b, n0), call.omega_d.stride[2], n, n);
            T *value = y + s * width;
            for (int64_t i = 0; i < n; i++) value[i] += loc[i] + root[i] * noise[i];
            store_row(call.y, call.y.at(s0 + s, b, n0), 1, value, n);
        }
    });
}

// The sum of grad_d over these pixels, where d is one value.
template <class T> double sample_backward(const SamplesBackward &call, int64_t b, int64_t from, int64_t to) {
    const int64_t R = call.R, group = least(call.S, GROUP), width = row_width<T>(1);
    scratch.reserve(Scratch::bytes<T>((R + group + 4) * width) + Scratch::bytes<T>(group * R));
    T *out = scratch.take<T>((R + group + 4) * width), *omega = scratch.take<T>(group * R);
    T *g = out + R * width, *root = g + group * width, *sum_d = root + width, *noise = sum_d + width;
    T *row = noise + width;
    const bool of_P = call.grad_P.data, of_d = call.grad_d.data, of_noise = call.grad_omega_d.data;
    double total = 0;
    for_blocks<T>(from, to, 1, [&](int64_t n0, int64_t n, int64_t padded) {
        load_root(root, call.d, call.one_d, b, n0, n, padded);
        for (int64_t i = 0; i < padded; i++) sum_d[i] = 0;
        for (int64_t s0 = 0; s0 < most(call.S, 1); s0 += GROUP) {
            const int64_t S = least(GROUP, call.S - s0);
            load_omega(omega, call.omega_p, b, s0, S, R);
            for (int64_t s = 0; s < S; s++) {
                T *grad = g + s * width;
                load_row(grad, call.grad_y, call.grad_y.at(s0 + s, b, n0), call.grad_y.stride[2], n, padded);
                if (of_d) {
                    load_row(noise, call.omega_d, call.omega_d.at(s0 + s, b, n0), call.omega_d.stride[2], n, n);
                    for (int64_t i = 0; i < n; i++) sum_d[i] += grad[i] * noise[i];
                }
                if (of_noise) {
                    for (int64_t i = 0; i < n; i++) row[i] = grad[i] * root[i];
                    store_row(call.grad_omega_d, call.grad_omega_d.at(s0 + s, b, n0), 1, row, n);
                }
            }
            if (of_P)
                products(Matrix<T>{omega, 1, R}, R, g, width, S, padded, [&](int64_t r, int64_t i, const auto &sums) {
                    for (int m = 0; m < count_of(sums); m++) {
                        T *at = out + (r + m) * width + i;
                        store(at, s0 ? load(at) + sums[m] : sums[m]);
                    }
                });
        }
        if (of_P) store_block(call.grad_P, out, width, b, n0, n, R);
        if (of_d && call.one_d)
            for (int64_t i = 0; i < n; i++) total += double(sum_d[i] / (2 * root[i]));
        else if (of_d) {
            for (int64_t i = 0; i < n; i++) row[i] = sum_d[i] / (2 * root[i]);
            store_row(call.grad_d, call.grad_d.at(0, b, n0), 1, row, n);
        }
    });
    return total;
}

template void sample<float>(const Samples &, int64_t, int64_t, int64_t, int64_t, int64_t);
template void sample<double>(const Samples &, int64_t, int64_t, int64_t, int64_t, int64_t);
template double sample_backward<float>(const SamplesBackward &, int64_t, int64_t, int64_t);
template double sample_backward<double>(const SamplesBackward &, int64_t, int64_t, int64_t);

} // namespace VARIANT
