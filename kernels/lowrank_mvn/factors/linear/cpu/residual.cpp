// Pass 2 of a linear factor: the residual r = δ − F̃ᵀ(u + m) in float64, rounded once, rᵀD⁻¹r and F̃D⁻¹r.
#include "../../../device/csrc/exact.h"
#include "../../../device/csrc/sums.h"
#include "linear.h"

namespace VARIANT {
namespace {

thread_local Scratch scratch;

template <class T> double sum_of(const T *row, int64_t n) {
    Eight<double> sum = {};
    for (int64_t i = 0; i + 8 <= n; i += 8) sum += eight_of<double>(row + i);
    for (int64_t i = n / 8 * 8; i < n; i++) sum[i % 8] += double(row[i]);
    return total(sum);
}

// Rows q0 to q1 of a chunk of pixels: F̃z [q1 − q0, K], then Σz and rᵀz of each row.
template <class T, class Out>
void chunk(const LinearResidual &call, int64_t b, int64_t from, int64_t to, int64_t q0, int64_t q1, double *sums) {
    const int64_t K = call.K, rows = q1 - q0, width = row_width<T>(K), places = Sums<T>::places(K, rows, false);
    const int64_t all = call.S * call.channels;
    scratch.reserve(Scratch::bytes<T>((K + rows + 1) * width) + Scratch::bytes<double>((rows + 1) * width) +
                    Scratch::bytes<double>(rows * K) + Scratch::bytes<Vec<T>>(places));
    T *F = scratch.take<T>((K + rows + 1) * width), *z = F + K * width, *d_inv = z + rows * width;
    double *r = scratch.take<double>((rows + 1) * width), *loc = r + rows * width, *u = scratch.take<double>(rows * K);
    for (int64_t i = 0; i < rows * (K + 2); i++) sums[i] = 0;
    Sums<T> made(K, rows, false, sums - K * (K + 1) / 2, scratch.take<Vec<T>>(places));
    double *sum_z = sums + rows * K, *rz = sum_z + rows;
    for (int64_t q = 0; q < rows; q++)
        memcpy(u + q * K, call.u + (b * all + q0 + q) * (K + 1), sizeof(double) * K);
    for_blocks<T>(from, to, K, [&](int64_t n0, int64_t n, int64_t padded) {
        const int64_t whole = up_to_multiple(n, 32);
        load_block(F, width, call.F, b, n0, n, most(whole, padded), call.pixels, K);
        for (int64_t q = 0; q < rows; q++) {
            const int64_t s = (q0 + q) / call.channels, c = (q0 + q) % call.channels;
            double *delta = r + q * width;
            const double constant = call.u[(b * all + q0 + q) * (K + 1) + K];
            load_row(delta, call.x, call.x.at(s, b, n0) + c * call.x_channel, call.x.stride[2], n, whole);
            for (int64_t i = 0; i < n; i++) delta[i] -= constant;
            if (!call.loc.data) continue;
            load_row(loc, call.loc, call.loc.at(s, b, n0) + c * call.loc_channel, call.loc.stride[2], n, whole);
            for (int64_t i = 0; i < n; i++) delta[i] -= loc[i];
        }
        make_residuals(r, F, width, whole, u, K, rows);
        for (int64_t q = 0; q < rows; q++) {
            const int64_t s = (q0 + q) / call.channels, c = (q0 + q) % call.channels;
            Out *kept = (Out *)call.residual + ((s * call.B + b) * call.channels + c) * call.pixels + n0;
            for (int64_t i = 0; i < n; i++) kept[i] = Out(r[q * width + i]);
            const int64_t at = call.d.at(0, b, call.one_d ? 0 : n0) + c * call.d_channel;
            load_row(d_inv, call.d, at, call.one_d ? 0 : call.d.stride[2], n, n);
            for (int64_t i = 0; i < n; i++) d_inv[i] = 1 / d_inv[i];
            rz[q] += scale(z + q * width, r + q * width, d_inv, n, padded);
            sum_z[q] += sum_of(z + q * width, n);
        }
        made.add(F, width, padded);
    });
    made.finish();
}

} // namespace

int64_t linear_residual(const LinearResidual &call) {
    const int64_t K = call.K, all = call.S * call.channels, groups = parts(all, GROUP);
    const int64_t pixels = chunk_pixels(K), chunks = parts(call.pixels, pixels), size = GROUP * (K + 2);
    Scratch room;
    room.reserve(Scratch::bytes<double>(call.B * groups * chunks * size));
    double *everywhere = room.take<double>(call.B * groups * chunks * size);
    pool::each(call.B * groups * chunks, call.threads, [&](int64_t unit) {
        const int64_t b = unit / chunks / groups, q0 = unit / chunks % groups * GROUP, q1 = least(all, q0 + GROUP);
        const int64_t from = unit % chunks * pixels, to = least(call.pixels, from + pixels);
        auto pass = chunk<float, float>;
        if (call.wide[b]) pass = chunk<double, float>;
        if (call.in_double) pass = chunk<double, double>;
        pass(call, b, from, to, q0, q1, everywhere + unit * size);
    });
    for (int64_t b = 0; b < call.B; b++)
        for (int64_t q = 0; q < all; q++) {
            const int64_t group = q / GROUP, row = q % GROUP, rows = least(GROUP, all - group * GROUP);
            double *zF = call.zF + (b * all + q) * (K + 1), *rz = call.rz + b * all + q;
            for (int64_t k = 0; k <= K; k++) zF[k] = 0;
            *rz = 0;
            for (int64_t c = 0; c < chunks; c++) {
                const double *sums = everywhere + ((b * groups + group) * chunks + c) * size;
                for (int64_t k = 0; k < K; k++) zF[k] += sums[row * K + k];
                zF[K] += sums[rows * K + row];
                *rz += sums[rows * (K + 1) + row];
            }
        }
    return 0;
}

} // namespace VARIANT
