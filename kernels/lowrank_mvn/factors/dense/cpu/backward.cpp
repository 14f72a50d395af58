// The backward pass over some pixels of an item: read P, write grad_P, and the other gradients on the way.
//
//     grad_x = 2az = −grad_loc        grad_P = 2b D⁻¹PC⁻¹ − 2a z vᵀ        grad_d = bπ − az²
//
// with z = D⁻¹(r − PC⁻¹g), π = (1 − h)/d and the leverages h = diag(PC⁻¹Pᵀ)/d. 1 − h cancels where h is near one: what
// is least of it, and its sum, tell whether the item has to be made with more care.
#include <cmath>

#include "../../../device/csrc/products.h"
#include "dense.h"

namespace VARIANT {
namespace {

thread_local Scratch scratch;

INLINE bool wanted(const Tensor &t) { return t.data != nullptr; }

template <class T> class Pass {
  public:
    Pass(const Backward &call, const double *whole, int64_t b, Remainder &remainder)
        : call(call), b(b), remainder(remainder) {
        const int64_t rows = 2 * R + group + 5;
        scratch.reserve(Scratch::bytes<T>(rows * width) + Scratch::bytes<T>(R * R) + 2 * Scratch::bytes<T>(group * R));
        P = scratch.take<T>(rows * width);
        out = P + R * width, z = out + R * width, d_inv = z + group * width;
        h = d_inv + width, az = h + width, az_squared = az + width, row = az_squared + width;
        C_inv = scratch.take<T>(R * R), step = scratch.take<T>(group * R), v = scratch.take<T>(group * R);
        for (int64_t i = 0; i < R * R; i++) C_inv[i] = T(whole[i]);
    }

    // Pixels n0 to n0 + n.
    void block(int64_t n0, int64_t n, int64_t padded) {
        load_block(P, width, call.P, b, n0, n, padded, call.N, R);
        load_row(d_inv, call.d, call.d.at(0, b, call.one_d ? 0 : n0), call.one_d ? 0 : call.d.stride[2], n, n);
        for (int64_t i = 0; i < n; i++) d_inv[i] = 1 / d_inv[i];
        for (int64_t i = n; i < padded; i++) d_inv[i] = 0;
        for (int64_t i = 0; i < padded; i++) az[i] = az_squared[i] = 0;
        // In place where rows of the gradient are rows of pixels too.
        T *to = out;
        int64_t to_width = width;
        if (of_P && call.S <= 1 && n == padded && call.grad_P.stride[1] == 1 &&
            call.grad_P.kind == (sizeof(T) == 8 ? FLOAT64 : FLOAT32)) {
            to = (T *)call.grad_P.data + call.grad_P.at(b, n0, 0);
            to_width = call.grad_P.stride[2];
        }
        // Of one sample z vᵀ is added on the way; of several it is a product of its own.
        const bool one = call.S == 1 && of_P;
        if (call.S) scores(0, group, n0, n, padded);
        if (one) of_logdet<true>(to, to_width, padded);
        else if (of_P || of_each_d) of_logdet<false>(to, to_width, padded);
        for (int64_t s = 0; s < call.S; s += group) {
            const int64_t count = least(group, call.S - s);
            if (s) scores(s, count, n0, n, padded);
            if (of_P && !one) of_scores(to, to_width, count, padded);
            vectors(s, count, n0, n);
        }
        if (of_P && to == out) store_block(call.grad_P, out, width, b, n0, n, R);
        if (of_d) of_diagonal(n0, n);
        if (of_loc && call.loc_samples < call.S) {
            for (int64_t i = 0; i < n; i++) row[i] = -2 * az[i];
            store_row(call.grad_loc, call.grad_loc.at(0, b, n0), 1, row, n);
        }
    }

  private:
    const Backward &call;
    const int64_t b, R = call.R, group = least(call.S, GROUP), width = row_width<T>(1);
    const bool of_P = wanted(call.grad_P), of_d = wanted(call.grad_d), of_each_d = of_d && !call.one_d;
    const bool of_x = wanted(call.grad_x), of_loc = wanted(call.grad_loc);
    Remainder &remainder;
    T *P, *out, *z, *d_inv, *h, *az, *az_squared, *row; // rows of a block
    T *C_inv, *step, *v;                                // [R, R], [group, R]: the last is −2av

    // 2b D⁻¹PC⁻¹, with one sample less 2a z vᵀ, and the leverages.
    template <bool one> void of_logdet(T *to, int64_t to_width, int64_t padded) {
        const T twice_b = T(2 * call.b[b]);
        for (int64_t i = 0; i < padded; i++) h[i] = 0;
        products(Matrix<T>{C_inv, R, 1}, R, P, width, R, padded, [&](int64_t r, int64_t i, const auto &sums) {
            const Vec<T> inverse = load(d_inv + i), score = load(z + i);
            Vec<T> leverage = load(h + i);
            for (int m = 0; m < count_of(sums); m++) {
                const Vec<T> scaled = sums[m] * inverse;
                leverage += scaled * load(P + (r + m) * width + i);
                store(to + (r + m) * to_width + i, one ? scaled * twice_b + score * v[r + m] : scaled * twice_b);
            }
            store(h + i, leverage);
        });
    }

    // z of the samples s0 to s0 + count, and the steps and −2av that go with them.
    void scores(int64_t s0, int64_t count, int64_t n0, int64_t n, int64_t padded) {
        for (int64_t s = 0; s < count; s++) {
            const int64_t item = (s0 + s) * call.B + b;
            for (int64_t k = 0; k < R; k++) {
                step[s * R + k] = T(call.step[item * R + k]);
                v[s * R + k] = T(-2 * call.a[item] * call.v[item * R + k]);
            }
            load_row(z + s * width, call.residual, call.residual.at(s0 + s, b, n0), call.residual.stride[2], n, padded);
        }
        products(Matrix<T>{step, R, 1}, count, P, width, R, padded, [&](int64_t s, int64_t i, const auto &shift) {
            const Vec<T> inverse = load(d_inv + i);
            for (int m = 0; m < count_of(shift); m++) {
                T *at = z + (s + m) * width + i;
                store(at, (load(at) - shift[m]) * inverse);
            }
        });
    }

    // −2a z vᵀ.
    void of_scores(T *to, int64_t to_width, int64_t count, int64_t padded) {
        products(Matrix<T>{v, 1, R}, R, z, width, count, padded, [&](int64_t r, int64_t i, const auto &sums) {
            for (int m = 0; m < count_of(sums); m++) {
                T *at = to + (r + m) * to_width + i;
                store(at, load(at) + sums[m]);
            }
        });
    }

    // What follows from z for the vectors.
    void vectors(int64_t s0, int64_t count, int64_t n0, int64_t n) {
        for (int64_t s = 0; s < count; s++) {
            const T a = T(call.a[(s0 + s) * call.B + b]), *score = z + s * width;
            for (int64_t i = 0; i < n; i++) {
                row[i] = a * score[i];
                az[i] += row[i];
                az_squared[i] += row[i] * score[i];
            }
            if (of_x) {
                T *twice = z + s * width;
                for (int64_t i = 0; i < n; i++) twice[i] = 2 * row[i];
                store_row(call.grad_x, call.grad_x.at(s0 + s, b, n0), 1, twice, n);
            }
            if (of_loc && call.loc_samples == call.S) {
                for (int64_t i = 0; i < n; i++) row[i] *= -2;
                store_row(call.grad_loc, call.grad_loc.at(s0 + s, b, n0), 1, row, n);
            }
        }
    }

    void of_diagonal(int64_t n0, int64_t n) {
        if (call.one_d) {
            for (int64_t i = 0; i < n; i++) remainder.grad_d -= double(az_squared[i]);
            return;
        }
        const T of_pi = T(call.b[b]);
        for (int64_t i = 0; i < n; i++) h[i] = 1 - h[i];
        for (int64_t i = 0; i < n; i++) row[i] = of_pi * (h[i] * d_inv[i]) - az_squared[i];
        store_row(call.grad_d, call.grad_d.at(0, b, n0), 1, row, n);
        double smallest = remainder.least;
        for (int64_t i = 0; i < n; i++) {
            smallest = h[i] < smallest ? h[i] : smallest;
            remainder.sum += h[i];
        }
        remainder.least = smallest;
    }
};

} // namespace

template <class T>
Remainder go_back(const Backward &call, const double *C_inv, int64_t b, int64_t from, int64_t to) {
    Remainder remainder{1, 0, 0};
    Pass<T> pass(call, C_inv, b, remainder);
    for_blocks<T>(from, to, 1, [&](int64_t n0, int64_t n, int64_t padded) { pass.block(n0, n, padded); });
    return remainder;
}

template Remainder go_back<float>(const Backward &, const double *, int64_t, int64_t, int64_t);
template Remainder go_back<double>(const Backward &, const double *, int64_t, int64_t, int64_t);

} // namespace VARIANT
