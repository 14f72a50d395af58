// What the passes of a stencil share: the call as Python packs it, and the lines of an image.
//
// A line is what lies along the last dimension of an image. The neighbours of its pixels are in a few other lines, each
// shifted by some pixels, so that a pass goes from line to line whatever the number of dimensions.
#pragma once

#include "../../../device/csrc/pool.h"
#include "../../../device/csrc/scratch.h"
#include "../../../device/csrc/views.h"

namespace VARIANT::stencil {

// Indices (s, b, c, n); of weights of neighbours (k, b, c, n), of ties (pair, b, 0, n).
struct Image {
    char *data;
    int64_t kind;
    int64_t stride[4];

    INLINE int64_t at(int64_t i, int64_t b, int64_t c, int64_t n) const {
        return i * stride[0] + b * stride[1] + c * stride[2] + n * stride[3];
    }
};

// Sizes of an image of `dims` dimensions and the offsets of its `count` later neighbours.
struct Neighbourhood {
    int64_t dims, count;
    const int64_t *spatial, *offsets; // [dims], [count, dims]
};

// t is of the type that is computed in, its pixels side by side, in each call.
struct Product {
    int64_t S, B, channels, threads, in_double;
    Neighbourhood near;
    Image x, loc, log_t, t, s, m; // loc is null without a mean, m without ties
    char *y;                      // [S, B, channels, pixels]
    double *squares, *logs;       // [S, B], [B]
};

// Gradients are contiguous, of their inputs' shapes, and null where they are not wanted.
struct ProductBackward {
    int64_t S, B, channels, stencils, threads, in_double;
    Neighbourhood near;
    Image x, loc, t, s, m, y, grad_y;      // x is null where no weight of a neighbour or tie needs it
    const double *grad_q, *grad_logdet;    // [S, B], [B], or null
    Image grad_x, grad_loc, grad_log_t, grad_s, grad_m;
    int64_t one_loc; // of all samples
};

struct Solve {
    int64_t S, B, channels, threads, transposed, in_double;
    Neighbourhood near;
    Image x, t, s, m;
    char *y; // [S, B, channels, pixels]
};

// The lines of an image, and which of them are neighbours.
class Lines {
  public:
    explicit Lines(const Neighbourhood &near) : near(near), width(near.spatial[near.dims - 1]), count(1), reach(0) {
        for (int64_t i = 0; i + 1 < near.dims; i++) count *= near.spatial[i];
        for (int64_t k = 0; k < near.count; k++) reach = most(reach, jump(k));
    }
    // How many pixels along its line, and how many lines on, the k-th later neighbour is.
    int64_t shift(int64_t k) const { return near.offsets[k * near.dims + near.dims - 1]; }
    int64_t jump(int64_t k) const {
        int64_t lines = 0;
        for (int64_t i = 0; i + 1 < near.dims; i++) lines = lines * near.spatial[i] + near.offsets[k * near.dims + i];
        return lines;
    }
    // Whether the image has the line that is the k-th offset, times `sign`, away from this one.
    bool has(int64_t line, int64_t k, int64_t sign) const {
        for (int64_t i = near.dims - 2; i >= 0; i--) {
            const int64_t at = line % near.spatial[i] + sign * near.offsets[k * near.dims + i];
            if (at < 0 || at >= near.spatial[i]) return false;
            line /= near.spatial[i];
        }
        return true;
    }

    const Neighbourhood &near;
    const int64_t width; // pixels of a line
    int64_t count;
    int64_t reach; // lines from a pixel to its last neighbour
};

// The place of channels c < later among the pairs (0, 1), (0, 2), …, (1, 2), …
INLINE int64_t pair(int64_t c, int64_t later, int64_t channels) {
    return c * channels - c * (c + 1) / 2 + later - c - 1;
}

// A line of values: where they lie if that can be read as it is, else a copy in `room`.
template <class T> const T *line_of(const Image &a, int64_t i, int64_t b, int64_t c, int64_t n, int64_t width, T *room) {
    constexpr int64_t own = sizeof(T) == 8 ? FLOAT64 : FLOAT32;
    if (a.kind == own && a.stride[3] == 1) return (const T *)a.data + a.at(i, b, c, n);
    load_row(room, VARIANT::Tensor{a.data, a.kind, {}}, a.at(i, b, c, n), a.stride[3], width, width);
    return room;
}

// Weights of a tie, of which there may be one for all pixels.
template <class T>
const T *ties_of(const Image &m, int64_t c, int64_t later, int64_t channels, int64_t b, int64_t n, int64_t width, T *room) {
    return line_of(m, pair(c, later, channels), b, 0, n, width, room);
}

// x − μ of a line.
template <class T>
void load_delta(T *row, T *room, const Image &x, const Image &loc, int64_t s, int64_t b, int64_t c, int64_t n,
                int64_t width) {
    const T *value = line_of(x, s, b, c, n, width, row);
    if (!loc.data) {
        if (value != row) memcpy(row, value, width * sizeof(T));
        return;
    }
    const T *mean = line_of(loc, s, b, c, n, width, room);
    for (int64_t w = 0; w < width; w++) row[w] = value[w] - mean[w];
}

// to[w] += weight[w] · value[w + shift] where the line has that pixel.
template <class T>
INLINE void add_shifted(T *__restrict to, const T *__restrict weight, const T *__restrict value, int64_t shift,
                        int64_t width) {
    const int64_t last = least(width, width - shift);
    for (int64_t w = most(0, -shift); w < last; w++) to[w] += weight[w] * value[w + shift];
}

template <class T> INLINE void add_products(T *__restrict to, const T *__restrict a, const T *__restrict b, int64_t n) {
    for (int64_t w = 0; w < n; w++) to[w] += a[w] * b[w];
}

// Lines of a unit of work: few enough for the cache, many enough that what lies around them is a small part.
INLINE int64_t lines_of_unit(const Lines &lines) { return most(parts(2048, lines.width), 4 * lines.reach); }

// --- What the library offers: a file each ------------------------------------------------------------------------------

// They return 0: no item is in doubt.
int64_t product(const Product &call);
int64_t product_backward(const ProductBackward &call);
int64_t solve(const Solve &call);

} // namespace VARIANT::stencil
