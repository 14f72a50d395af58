// y = Tᵀ(x − μ), ‖y‖² and Σ log t: x, μ and every weight are read once, y is written.
#include "stencil.h"

namespace VARIANT::stencil {
namespace {

thread_local Scratch scratch;

template <class T> void add_squares(Eight<double> &sums, const T *row, int64_t n) {
    int64_t w = 0;
    for (; w + 8 <= n; w += 8) {
        const Eight<double> a = eight_of<double>(row + w);
        sums += a * a;
    }
    for (; w < n; w++) sums[w % 8] += double(row[w]) * double(row[w]);
}

template <class T> double sum_of(const T *row, int64_t n) {
    Eight<double> sums = {};
    int64_t w = 0;
    for (; w + 8 <= n; w += 8) sums += eight_of<double>(row + w);
    for (; w < n; w++) sums[w % 8] += double(row[w]);
    return total(sums);
}

// Lines `from` to `to` of a channel of one sample; their ‖y‖².
template <class T>
double transform(const Product &call, const Lines &lines, int64_t s, int64_t b, int64_t c, int64_t from, int64_t to) {
    const int64_t width = lines.width, pixels = lines.count * width, ring = lines.reach + 1;
    scratch.reserve(Scratch::bytes<T>((ring + 3) * width));
    T *kept = scratch.take<T>((ring + 3) * width), *other = kept + ring * width, *room = other + width;
    T *of_weights = room + width;
    T *y = (T *)call.y + ((s * call.B + b) * call.channels + c) * pixels;
    Eight<double> squares = {};
    int64_t loaded = from;
    for (int64_t line = from; line < to; line++) {
        for (; loaded < lines.count && loaded <= line + lines.reach; loaded++)
            load_delta(kept + loaded % ring * width, room, call.x, call.loc, s, b, c, loaded * width, width);
        T *row = y + line * width;
        memcpy(row, kept + line % ring * width, width * sizeof(T));
        for (int64_t k = 0; k < lines.near.count; k++) {
            if (!lines.has(line, k, 1)) continue;
            const T *weight = line_of(call.s, k, b, c, line * width, width, of_weights);
            add_shifted(row, weight, (const T *)kept + (line + lines.jump(k)) % ring * width, lines.shift(k), width);
        }
        for (int64_t later = c + 1; call.m.data && later < call.channels; later++) {
            load_delta(other, room, call.x, call.loc, s, b, later, line * width, width);
            add_products(row, ties_of(call.m, c, later, call.channels, b, line * width, width, of_weights), other, width);
        }
        const T *t = line_of(call.t, 0, b, c, line * width, width, room);
        for (int64_t w = 0; w < width; w++) row[w] *= t[w];
        add_squares(squares, row, width);
    }
    return total(squares);
}

template <class T> double sum_of_logs(const Product &call, const Lines &lines, int64_t b, int64_t c, int64_t from, int64_t to) {
    double sum = 0;
    scratch.reserve(Scratch::bytes<T>(lines.width));
    T *room = scratch.take<T>(lines.width);
    for (int64_t line = from; line < to; line++)
        sum += sum_of(line_of(call.log_t, 0, b, c, line * lines.width, lines.width, room), lines.width);
    return sum;
}

template <class T> void product_in(const Product &call) {
    const Lines lines(call.near);
    const int64_t step = lines_of_unit(lines), units = parts(lines.count, step), of_item = call.channels * units;
    Scratch sums;
    sums.reserve(Scratch::bytes<double>((call.S + 1) * call.B * of_item));
    double *found = sums.take<double>((call.S + 1) * call.B * of_item), *logs = found + call.S * call.B * of_item;
    pool::each(call.B * of_item, call.threads, [&](int64_t unit) {
        const int64_t b = unit / of_item, c = unit / units % call.channels, from = unit % units * step;
        const int64_t to = least(lines.count, from + step);
        logs[unit] = sum_of_logs<T>(call, lines, b, c, from, to);
        for (int64_t s = 0; s < call.S; s++)
            found[s * call.B * of_item + unit] = transform<T>(call, lines, s, b, c, from, to);
    });
    for (int64_t i = 0; i < call.S * call.B; i++) {
        call.squares[i] = 0;
        for (int64_t unit = 0; unit < of_item; unit++) call.squares[i] += found[i * of_item + unit];
    }
    for (int64_t b = 0; b < call.B; b++) {
        call.logs[b] = 0;
        for (int64_t unit = 0; unit < of_item; unit++) call.logs[b] -= 2 * logs[b * of_item + unit];
    }
}

} // namespace

int64_t product(const Product &call) {
    call.in_double ? product_in<double>(call) : product_in<float>(call);
    return 0;
}

} // namespace VARIANT::stencil
