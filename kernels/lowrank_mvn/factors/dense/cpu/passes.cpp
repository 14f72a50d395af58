// The passes that need no step after another one: cut into units, which are shared out.
#include <cmath>

#include "../../../device/csrc/algebra.h"
#include "dense.h"

namespace VARIANT {

// Pixels of a unit. Fewer than of a chunk: what it leaves is no more than three numbers.
constexpr int64_t UNIT = 1024;

// Whether a product with C⁻¹ is not good enough; `work` has R * R + 2R places.
static bool doubtful_rows(const double *L_inv, int64_t R, bool in_double, double *work) {
    double *inverse = work + R * R, *diagonal = inverse + R, largest = 0;
    inverse_diagonal(L_inv, R, inverse);
    for (int64_t j = 0; j < R; j++) largest = inverse[j] > largest ? inverse[j] : largest;
    if (!(largest > INFORMED)) return false;
    diagonal_of(L_inv, R, diagonal, work);
    largest = 0;
    for (int64_t j = 0; j < R; j++) largest = diagonal[j] * inverse[j] > largest ? diagonal[j] * inverse[j] : largest;
    return EPS * largest > good_enough(in_double);
}

int64_t backward(const Backward &call) {
    if (of_few(call) && call.S <= 1) return backward_of_few(call);
    const int64_t B = call.B, N = call.N, R = call.R, units = parts(N, UNIT);
    const bool of_one_d = call.grad_d.data && call.one_d, of_each_d = call.grad_d.data && !call.one_d;
    Scratch room;
    room.reserve(Scratch::bytes<Remainder>(B * units) + Scratch::bytes<double>(B * R * R));
    Remainder *found = room.take<Remainder>(B * units);
    double *C_inv = room.take<double>(B * R * R);
    pool::each(B, call.threads, [&](int64_t b) {
        thread_local Scratch scratch;
        scratch.reserve(Scratch::bytes<double>(R * R + 2 * R));
        double *work = scratch.take<double>(R * R + 2 * R);
        invert(call.L_inv + b * R * R, R, C_inv + b * R * R);
        call.doubtful[b] = doubtful_rows(call.L_inv + b * R * R, R, call.in_double, work);
    });
    pool::each(B * units, call.threads, [&](int64_t unit) {
        const int64_t b = unit / units, from = unit % units * UNIT, to = least(N, from + UNIT);
        const auto pass = call.in_double || call.wide[b] ? go_back<double> : go_back<float>;
        found[unit] = pass(call, C_inv + b * R * R, b, from, to);
    });
    int64_t doubtful = 0;
    for (int64_t b = 0; b < B; b++) {
        Remainder all{1, 0, 0};
        double trace = 0;
        for (int64_t i = b * units; i < (b + 1) * units; i++) {
            all.least = found[i].least < all.least ? found[i].least : all.least;
            all.sum += found[i].sum, all.grad_d += found[i].grad_d;
        }
        for (int64_t j = 0; j < R; j++) trace += C_inv[(b * R + j) * R + j];
        const double rest = double(N - R) + trace; // the sum of 1 − h
        if (of_each_d) {
            const double off = std::fabs(all.sum - rest);
            call.doubtful[b] |= all.least < SMALL;
            call.doubtful[b] |= call.wide[b] && off > TOLERANCE * std::sqrt(N > R ? double(N) / double(R) : 1);
        }
        if (of_one_d) {
            double d;
            load_row(&d, call.d, call.d.at(0, b, 0), 0, 1, 1);
            const double grad_d = all.grad_d + call.b[b] * rest / d;
            store_row(call.grad_d, call.grad_d.at(0, b, 0), 0, &grad_d, 1);
            call.doubtful[b] |= N <= R;
        }
        doubtful += call.doubtful[b];
    }
    return doubtful;
}

int64_t samples(const Samples &call) {
    if (of_few(call)) return samples_of_few(call);
    const int64_t units = parts(call.N, UNIT), groups = parts(call.S, GROUP);
    pool::each(call.B * groups * units, call.threads, [&](int64_t unit) {
        const int64_t b = unit / units / groups, s0 = unit / units % groups * GROUP, s1 = least(call.S, s0 + GROUP);
        const int64_t from = unit % units * UNIT, to = least(call.N, from + UNIT);
        if (call.in_double) sample<double>(call, b, from, to, s0, s1);
        else sample<float>(call, b, from, to, s0, s1);
    });
    return 0;
}

int64_t samples_backward(const SamplesBackward &call) {
    if (of_few(call)) return samples_backward_of_few(call);
    const int64_t units = parts(call.N, UNIT);
    Scratch room;
    room.reserve(Scratch::bytes<double>(call.B * units));
    double *found = room.take<double>(call.B * units);
    pool::each(call.B * units, call.threads, [&](int64_t unit) {
        const int64_t b = unit / units, from = unit % units * UNIT, to = least(call.N, from + UNIT);
        const auto pass = call.in_double ? sample_backward<double> : sample_backward<float>;
        found[unit] = pass(call, b, from, to);
    });
    for (int64_t b = 0; call.grad_d.data && call.one_d && b < call.B; b++) {
        double sum = 0;
        for (int64_t i = b * units; i < (b + 1) * units; i++) sum += found[i];
        store_row(call.grad_d, call.grad_d.at(0, b, 0), 0, &sum, 1);
    }
    return 0;
}

} // namespace VARIANT
