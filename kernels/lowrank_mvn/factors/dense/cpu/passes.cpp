// The passes that need no step after another one: cut into units, which are shared out.
#include <new>

#include "dense.h"

namespace VARIANT {

// Pixels of a unit. Fewer than of a chunk: what it leaves is no more than three numbers.
constexpr int64_t UNIT = 1024;

void backward(const Backward &call) {
    const int64_t units = parts(call.N, UNIT);
    Scratch room;
    room.reserve(Scratch::bytes<Remainder>(call.B * units));
    Remainder *found = room.take<Remainder>(call.B * units);
    pool::each(call.B * units, call.threads, [&](int64_t unit) {
        const int64_t b = unit / units, from = unit % units * UNIT, to = least(call.N, from + UNIT);
        found[unit] = call.in_double || call.wide[b] ? go_back<double>(call, b, from, to) : go_back<float>(call, b, from, to);
    });
    for (int64_t b = 0; b < call.B; b++) {
        Remainder all{1, 0, 0};
        for (int64_t i = b * units; i < (b + 1) * units; i++) {
            all.least = found[i].least < all.least ? found[i].least : all.least;
            all.sum += found[i].sum, all.grad_d += found[i].grad_d;
        }
        if (call.least) call.least[b] = all.least, call.rest[b] = all.sum;
        if (call.grad_d.data && call.one_d) *(double *)(call.grad_d.data + 8 * call.grad_d.at(0, b, 0)) += all.grad_d;
    }
}

void samples(const Samples &call) {
    const int64_t units = parts(call.N, UNIT), groups = parts(call.S, GROUP);
    pool::each(call.B * groups * units, call.threads, [&](int64_t unit) {
        const int64_t b = unit / units / groups, s0 = unit / units % groups * GROUP, s1 = least(call.S, s0 + GROUP);
        const int64_t from = unit % units * UNIT, to = least(call.N, from + UNIT);
        if (call.in_double) sample<double>(call, b, from, to, s0, s1);
        else sample<float>(call, b, from, to, s0, s1);
    });
}

void samples_backward(const SamplesBackward &call) {
    const int64_t units = parts(call.N, UNIT);
    Scratch room;
    room.reserve(Scratch::bytes<double>(call.B * units));
    double *found = room.take<double>(call.B * units);
    pool::each(call.B * units, call.threads, [&](int64_t unit) {
        const int64_t b = unit / units, from = unit % units * UNIT, to = least(call.N, from + UNIT);
        found[unit] = call.in_double ? sample_backward<double>(call, b, from, to) : sample_backward<float>(call, b, from, to);
    });
    for (int64_t b = 0; call.grad_d.data && call.one_d && b < call.B; b++) {
        double sum = 0;
        for (int64_t i = b * units; i < (b + 1) * units; i++) sum += found[i];
        *(double *)(call.grad_d.data + 8 * call.grad_d.at(0, b, 0)) = sum;
    }
}

} // namespace VARIANT
