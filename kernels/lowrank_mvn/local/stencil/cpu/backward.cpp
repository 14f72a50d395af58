// Every gradient of y = Tᵀ(x − μ), of ‖y‖² and of log|Σ| in one pass. With g = grad_y + 2 grad_‖y‖² y and u = tg:
//
//     grad_x = Tg = −grad_loc        grad_log t = gy − 2 grad_log|Σ|        grad_s_k = uₙ δₙ₊ₖ        grad_m = u_c δ_c'
#include "stencil.h"

namespace VARIANT::stencil {
namespace {

thread_local Scratch scratch;

// A gradient of some lines: summed where it lies, or in `room` where that is of another type.
template <class T> struct Sum {
    const Image &grad;
    T *values;
    bool apart;

    Sum(const Image &grad, int64_t start, T *room) : grad(grad) {
        apart = grad.kind != (sizeof(T) == 8 ? FLOAT64 : FLOAT32);
        values = apart ? room : (T *)grad.data + start;
    }
    void begin(T value, int64_t n) {
        for (int64_t i = 0; i < n; i++) values[i] = value;
    }
    void end(int64_t start, int64_t n) {
        if (apart) store_row(VARIANT::Tensor{grad.data, grad.kind, {}}, start, 1, values, n);
    }
};

// Some lines of the channels that share a stencil.
template <class T> struct Lot {
    const ProductBackward &call;
    const Lines &lines;
    int64_t b, stencil, from, to;

    int64_t width() const { return lines.width; }
    int64_t pixels() const { return lines.count * lines.width; }
    int64_t own() const { return call.channels / call.stencils; }
    int64_t first() const { return stencil * own(); }

    // u of a line, and with `g` that too.
    void load_u(T *u, T *g, T *room, int64_t s, int64_t c, int64_t line) const {
        const int64_t W = width(), n = line * W;
        const T *grad = call.grad_y.data ? line_of(call.grad_y, s, b, c, n, W, g) : nullptr;
        if (call.grad_q) {
            const T scale = T(2 * call.grad_q[s * call.B + b]), *y = line_of(call.y, s, b, c, n, W, room);
            for (int64_t w = 0; w < W; w++) g[w] = (grad ? grad[w] : T(0)) + scale * y[w];
        } else
            for (int64_t w = 0; w < W; w++) g[w] = grad ? grad[w] : T(0);
        const T *t = line_of(call.t, 0, b, c, n, W, room);
        for (int64_t w = 0; w < W; w++) u[w] = t[w] * g[w];
    }

    // (Tg)ₙ = uₙ + Σₖ sₙ₋ₖ,ₖ uₙ₋ₖ + Σ_c'' m_c''c u_c'' of a line, whose u and that of the lines before it are in a ring.
    void scatter(T *grad, const T *ring, int64_t held, T *rooms, int64_t s, int64_t c, int64_t line) const {
        const int64_t W = width();
        memcpy(grad, ring + line % held * W, W * sizeof(T));
        for (int64_t k = 0; k < lines.near.count; k++) {
            if (!lines.has(line, k, -1)) continue;
            const int64_t before = line - lines.jump(k), shift = lines.shift(k);
            const T *weight = line_of(call.s, k, b, c, before * W, W, rooms);
            const T *u = ring + before % held * W;
            const int64_t last = least(W, W - shift);
            for (int64_t w = most(0, -shift); w < last; w++) grad[w + shift] += weight[w] * u[w];
        }
        for (int64_t earlier = 0; call.m.data && earlier < c; earlier++) {
            load_u(rooms, rooms + W, rooms + 2 * W, s, earlier, line);
            add_products(grad, ties_of(call.m, earlier, c, call.channels, b, line * W, W, rooms + 2 * W), rooms, W);
        }
    }

    void of_images() const {
        const int64_t W = width(), held = lines.reach + 1, n = (to - from) * W;
        scratch.reserve(Scratch::bytes<T>((held + 5) * W) + Scratch::bytes<T>(n));
        T *ring = scratch.take<T>((held + 5) * W), *grad = ring + held * W, *rooms = grad + W, *room = scratch.take<T>(n);
        for (int64_t c = first(); c < first() + own(); c++) {
            const int64_t start = (b * call.channels + c) * pixels() + from * W;
            Sum<T> sum(call.grad_loc, start, room);
            const bool summed = call.grad_loc.data && call.one_loc;
            if (summed) sum.begin(0, n);
            for (int64_t s = 0; s < call.S; s++) {
                for (int64_t line = most(0, from - lines.reach); line < to; line++) {
                    load_u(ring + line % held * W, rooms, rooms + W, s, c, line);
                    if (line < from) continue;
                    scatter(grad, ring, held, rooms, s, c, line);
                    const int64_t at = ((s * call.B + b) * call.channels + c) * pixels() + line * W;
                    if (call.grad_x.data)
                        store_row(VARIANT::Tensor{call.grad_x.data, call.grad_x.kind, {}}, at, 1, grad, W);
                    if (!call.grad_loc.data) continue;
                    for (int64_t w = 0; w < W; w++) grad[w] = -grad[w];
                    T *all = sum.values + (line - from) * W;
                    if (summed)
                        for (int64_t w = 0; w < W; w++) all[w] += grad[w];
                    else store_row(VARIANT::Tensor{call.grad_loc.data, call.grad_loc.kind, {}}, at, 1, grad, W);
                }
            }
            if (summed) sum.end(start, n);
        }
    }

    void of_diagonal() const {
        const int64_t W = width(), n = (to - from) * W;
        const int64_t start = (b * call.stencils + stencil) * pixels() + from * W;
        scratch.reserve(Scratch::bytes<T>(4 * W) + Scratch::bytes<T>(n));
        T *u = scratch.take<T>(4 * W), *g = u + W, *rooms = g + W;
        Sum<T> sum(call.grad_log_t, start, scratch.take<T>(n));
        sum.begin(call.grad_logdet ? T(-2.0 * double(own()) * call.grad_logdet[b]) : T(0), n);
        for (int64_t s = 0; s < call.S; s++)
            for (int64_t c = first(); c < first() + own(); c++)
                for (int64_t line = from; line < to; line++) {
                    load_u(u, g, rooms, s, c, line);
                    add_products(sum.values + (line - from) * W, (const T *)g,
                                 line_of(call.y, s, b, c, line * W, W, rooms), W);
                }
        sum.end(start, n);
    }

    void of_neighbours() const {
        const int64_t W = width(), n = (to - from) * W, held = lines.reach + 1, K = lines.near.count;
        const int64_t start = (b * call.stencils + stencil) * K * pixels() + from * W;
        scratch.reserve(Scratch::bytes<T>((held + 4) * W) + Scratch::bytes<T>(K * n));
        T *ring = scratch.take<T>((held + 4) * W), *u = ring + held * W, *g = u + W, *rooms = g + W;
        T *room = scratch.take<T>(K * n);
        for (int64_t k = 0; k < K; k++) Sum<T>(call.grad_s, start + k * pixels(), room + k * n).begin(0, n);
        for (int64_t s = 0; s < call.S; s++)
            for (int64_t c = first(); c < first() + own(); c++) {
                int64_t loaded = from;
                for (int64_t line = from; line < to; line++) {
                    for (; loaded < lines.count && loaded <= line + lines.reach; loaded++)
                        load_delta(ring + loaded % held * W, rooms, call.x, call.loc, s, b, c, loaded * W, W);
                    load_u(u, g, rooms, s, c, line);
                    for (int64_t k = 0; k < K; k++) {
                        if (!lines.has(line, k, 1)) continue;
                        T *grad = Sum<T>(call.grad_s, start + k * pixels(), room + k * n).values + (line - from) * W;
                        add_shifted(grad, (const T *)u, (const T *)ring + (line + lines.jump(k)) % held * W, lines.shift(k),
                                    W);
                    }
                }
            }
        for (int64_t k = 0; k < K; k++) Sum<T>(call.grad_s, start + k * pixels(), room + k * n).end(start + k * pixels(), n);
    }

    void of_ties() const {
        const int64_t W = width(), n = (to - from) * W, pairs = call.channels * (call.channels - 1) / 2;
        scratch.reserve(Scratch::bytes<T>(5 * W) + Scratch::bytes<T>(n));
        T *u = scratch.take<T>(5 * W), *g = u + W, *delta = g + W, *rooms = delta + W, *room = scratch.take<T>(n);
        for (int64_t c = first(); c < first() + own(); c++)
            for (int64_t later = c + 1; later < call.channels; later++) {
                const int64_t start = (b * pairs + pair(c, later, call.channels)) * pixels() + from * W;
                Sum<T> sum(call.grad_m, start, room);
                sum.begin(0, n);
                for (int64_t s = 0; s < call.S; s++)
                    for (int64_t line = from; line < to; line++) {
                        load_u(u, g, rooms, s, c, line);
                        load_delta(delta, rooms, call.x, call.loc, s, b, later, line * W, W);
                        add_products(sum.values + (line - from) * W, (const T *)u, (const T *)delta, W);
                    }
                sum.end(start, n);
            }
    }
};

template <class T> void backward_in(const ProductBackward &call) {
    const Lines lines(call.near);
    const int64_t step = lines_of_unit(lines), units = parts(lines.count, step);
    pool::each(call.B * call.stencils * units, call.threads, [&](int64_t unit) {
        const int64_t from = unit % units * step;
        const Lot<T> lot{call, lines, unit / units / call.stencils, unit / units % call.stencils, from,
                         least(lines.count, from + step)};
        if (call.grad_x.data || call.grad_loc.data) lot.of_images();
        if (call.grad_log_t.data) lot.of_diagonal();
        if (call.grad_s.data) lot.of_neighbours();
        if (call.grad_m.data) lot.of_ties();
    });
}

} // namespace

int64_t product_backward(const ProductBackward &call) {
    call.in_double ? backward_in<double>(call) : backward_in<float>(call);
    return 0;
}

} // namespace VARIANT::stencil
