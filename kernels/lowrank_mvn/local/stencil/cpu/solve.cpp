// Tᵀy = x by back-substitution, and Ty = x by forward substitution, from pixel to pixel, for several samples at once.
//
// With T = U diag(t), whose U has a unit diagonal: Uᵀy = x / t, or Uu = x and y = u / t. A unit of work is a group of
// samples of an item, and one channel or, where they are tied, all of them: pixels of a line lie side by side with their
// samples in vectors, and only the lines that a neighbourhood reaches are kept.
#include "stencil.h"

namespace VARIANT::stencil {
namespace {

thread_local Scratch scratch;

// Samples s0 to s0 + n of a line as rows[pixel][lanes]; lanes without a sample are zero.
template <class T> void load_samples(T *rows, int64_t lanes, const Image &x, int64_t start, int64_t n, int64_t width) {
    for (int64_t i = n < lanes ? 0 : width * lanes; i < width * lanes; i++) rows[i] = 0;
    with_type(VARIANT::Tensor{x.data, x.kind, {}}, [&](auto *data) {
        const int64_t stride_s = x.stride[0], stride_n = x.stride[3];
        const auto *p = data + start;
        int64_t s = 0;
        for (; stride_n == 1 && s + 8 <= n; s += 8) {
            int64_t w = 0;
            for (; w + 8 <= width; w += 8) {
                Eight<T> a[8];
                for (int k = 0; k < 8; k++) a[k] = eight_of<T>(p + (s + k) * stride_s + w);
                transpose<T>(a);
                for (int k = 0; k < 8; k++) store8(rows + (w + k) * lanes + s, a[k]);
            }
            for (; w < width; w++)
                for (int k = 0; k < 8; k++) rows[w * lanes + s + k] = T(value_of(p[(s + k) * stride_s + w]));
        }
        for (; s < n; s++)
            for (int64_t w = 0; w < width; w++) rows[w * lanes + s] = T(value_of(p[s * stride_s + w * stride_n]));
    });
}

// The way back, of samples that are `stride` apart.
template <class T> void store_samples(T *p, int64_t stride, const T *rows, int64_t lanes, int64_t n, int64_t width) {
    int64_t s = 0;
    for (; s + 8 <= n; s += 8) {
        int64_t w = 0;
        for (; w + 8 <= width; w += 8) {
            Eight<T> a[8];
            for (int k = 0; k < 8; k++) a[k] = load8(rows + (w + k) * lanes + s);
            transpose<T>(a);
            for (int k = 0; k < 8; k++) store8(p + (s + k) * stride + w, a[k]);
        }
        for (; w < width; w++)
            for (int k = 0; k < 8; k++) p[(s + k) * stride + w] = rows[w * lanes + s + k];
    }
    for (; s < n; s++)
        for (int64_t w = 0; w < width; w++) p[s * stride + w] = rows[w * lanes + s];
}

// A weight of each pixel, and what is solved already that it multiplies; both as if they began with the line, and
// counted at its pixels `from` to `to` alone.
template <class T, class V> struct Term {
    const T *weight;
    const V *y;
    int64_t from, to;
};

// y = x − Σ terms over a line, forwards or backwards; x is scaled first, if at all. A pixel has VECTORS of samples: it
// waits for its neighbour, and the second is solved in the meantime. COUNT is the number of terms where that is known.
template <class T, class V, int VECTORS, int COUNT>
void solve_line(V *y, const T *scale, const Term<T, V> *given, int64_t any, int64_t width, bool forwards) {
    const int64_t count = COUNT ? COUNT : any;
    Term<T, V> own[COUNT ? COUNT : 1]; // where the compiler knows that nobody writes to them
    const Term<T, V> *terms = given;
    int64_t from = 0, to = width; // where every term counts
    for (int64_t i = 0; i < count; i++) from = most(from, given[i].from), to = least(to, given[i].to);
    if (COUNT) {
        for (int i = 0; i < COUNT; i++) own[i] = given[i];
        terms = own;
    }
    for (int64_t step = 0; step < width; step++) {
        const int64_t w = forwards ? step : width - 1 - step;
        const T factor = scale ? 1 / scale[w] : T(1);
        V sum[VECTORS];
        for (int j = 0; j < VECTORS; j++) sum[j] = y[w * VECTORS + j] * factor;
        const bool inside = w >= from && w < to;
        for (int64_t i = 0; i < count; i++) {
            if (!inside && (w < terms[i].from || w >= terms[i].to)) continue;
            const T weight = terms[i].weight[w];
            for (int j = 0; j < VECTORS; j++) sum[j] -= weight * terms[i].y[w * VECTORS + j];
        }
        for (int j = 0; j < VECTORS; j++) y[w * VECTORS + j] = sum[j];
    }
}

template <class T, class V, int VECTORS> struct Walk {
    static constexpr int64_t SAMPLES = VECTORS * sizeof(V) / sizeof(T);
    const Solve &call;
    const Lines &lines;
    int64_t b, s0, samples, first, last; // channels first to last − 1
    int64_t ring;                        // lines that are kept of each channel
    V *kept, *out;
    T *room; // [terms, width]
    Term<T, V> *terms;

    V *kept_line(int64_t c, int64_t line) { return kept + ((c - first) * ring + line % ring) * lines.width * VECTORS; }

    // What the pixels of a line are tied to, those of their own line last: these are waited for.
    int64_t ties_and_neighbours(int64_t c, int64_t line) {
        const int64_t width = lines.width, n = line * width, sign = call.transposed ? -1 : 1;
        int64_t count = 0;
        for (int64_t other = first; call.m.data && other < last; other++) {
            if (call.transposed ? other >= c : other <= c) continue;
            const int64_t one = least(c, other), later = most(c, other);
            terms[count] = {ties_of(call.m, one, later, call.channels, b, n, width, room + count * width),
                            kept_line(other, line), 0, width};
            count++;
        }
        for (int64_t k = lines.near.count - 1; k >= 0; k--) {
            if (!lines.has(line, k, sign)) continue;
            // The weight of Tᵀ stands at the pixel, that of T at its earlier neighbour.
            const int64_t shift = sign * lines.shift(k), there = line + sign * lines.jump(k);
            const int64_t at = (call.transposed ? there : line) * width;
            const T *weight = line_of(call.s, k, b, c, at, width, room + count * width);
            terms[count++] = {call.transposed ? weight + shift : weight, kept_line(c, there) + shift * VECTORS, most(0, -shift),
                              least(width, width - shift)};
        }
        return count;
    }

    void solve_one(int64_t c, int64_t line) {
        const int64_t width = lines.width, n = line * width, pixels = lines.count * width;
        V *y = kept_line(c, line);
        load_samples((T *)y, SAMPLES, call.x, call.x.at(s0, b, c, n), samples, width);
        const T *t = line_of(call.t, 0, b, c, n, width, (T *)nullptr);
        const int64_t count = ties_and_neighbours(c, line);
        const T *scale = call.transposed ? nullptr : t;
        switch (count) {
        case 4: solve_line<T, V, VECTORS, 4>(y, scale, terms, count, width, call.transposed); break; // 3 × 3
        case 12: solve_line<T, V, VECTORS, 12>(y, scale, terms, count, width, call.transposed); break; // 5 × 5
        default: solve_line<T, V, VECTORS, 0>(y, scale, terms, count, width, call.transposed);
        }
        const V *solved = y;
        if (call.transposed) {
            for (int64_t w = 0; w < width; w++)
                for (int j = 0; j < VECTORS; j++) out[w * VECTORS + j] = y[w * VECTORS + j] * (1 / t[w]);
            solved = out;
        }
        T *p = (T *)call.y + ((s0 * call.B + b) * call.channels + c) * pixels + n;
        store_samples(p, call.B * call.channels * pixels, (const T *)solved, SAMPLES, samples, width);
    }

    void all() {
        for (int64_t step = 0; step < lines.count; step++)
            for (int64_t i = first; i < last; i++)
                if (call.transposed) solve_one(i, step);
                else solve_one(last - 1 - (i - first), lines.count - 1 - step);
    }
};

template <class T, class V, int VECTORS> void walk(const Solve &call, const Lines &lines) {
    constexpr int64_t lanes = Walk<T, V, VECTORS>::SAMPLES;
    const int64_t groups = parts(call.S, lanes), turns = call.m.data ? 1 : call.channels;
    const int64_t own = call.channels / turns, ring = lines.reach + 1, most_terms = lines.near.count + own;
    pool::each(call.B * groups * turns, call.threads, [&](int64_t unit) {
        const int64_t b = unit / turns / groups, s0 = unit / turns % groups * lanes, first = unit % turns * own;
        scratch.reserve(Scratch::bytes<V>((own * ring + 1) * lines.width * VECTORS) +
                        Scratch::bytes<T>(most_terms * lines.width) + Scratch::bytes<Term<T, V>>(most_terms));
        V *kept = scratch.take<V>((own * ring + 1) * lines.width * VECTORS), *out = kept + own * ring * lines.width * VECTORS;
        T *room = scratch.take<T>(most_terms * lines.width);
        auto *terms = scratch.take<Term<T, V>>(most_terms);
        Walk<T, V, VECTORS>{call, lines, b, s0, least(lanes, call.S - s0), first, first + own, ring, kept, out, room, terms}.all();
    });
}

template <class T> void solve_in(const Solve &call) {
    const Lines lines(call.near);
    if (call.S == 1) walk<T, T, 1>(call, lines);
    else if (call.S <= LANES<T>) walk<T, Vec<T>, 1>(call, lines);
    else walk<T, Vec<T>, 2>(call, lines);
}

} // namespace

int64_t solve(const Solve &call) {
    call.in_double ? solve_in<double>(call) : solve_in<float>(call);
    return 0;
}

} // namespace VARIANT::stencil
