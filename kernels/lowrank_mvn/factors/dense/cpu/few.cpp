// Many items of few pixels: eight items at once, one in each lane of a vector, and everything in float64.
//
// The same formulas as in the other files; what is an R x R matrix there is R² vectors here. Items that need more care
// are flagged, those that are not finite among them.
#include <cmath>

#include "../../../device/csrc/logarithm.h"
#include "dense.h"

namespace VARIANT {
namespace {

using Lanes = Eight<double>;
using Mask = Eight<int64_t>;

thread_local Scratch scratch;

// Items of a group. Where there are fewer than eight, the last one stands in the other lanes too.
struct Group {
    int64_t items[8], count;

    Group(int64_t first, int64_t B) : count(least(8, B - first)) {
        for (int64_t i = 0; i < 8; i++) items[i] = first + least(i, count - 1);
    }
};

// Strides of the items, rows and columns of a tensor [B, N, R].
struct Strides {
    int64_t item, row, column;
};
Strides of_factor(const Tensor &P) { return {P.stride[0], P.stride[1], P.stride[2]}; }
// Of a tensor [S, B, N] the pixels are rows, of one column.
Strides of_vector(const Tensor &t) { return {t.stride[1], t.stride[2], 0}; }

// rows x columns values of each item, as vectors [rows][columns].
void gather(Lanes *to, const Tensor &t, const Group &group, Strides stride, int64_t rows, int64_t columns) {
    with_type(t, [&](auto *data) {
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < columns; j++)
                for (int k = 0; k < 8; k++)
                    to[i * columns + j][k] =
                        double(value_of(data[group.items[k] * stride.item + i * stride.row + j * stride.column]));
    });
}

void scatter(const Lanes *from, const Tensor &t, const Group &group, Strides stride, int64_t rows, int64_t columns) {
    with_type(t, [&](auto *data) {
        for (int64_t k = 0; k < group.count; k++)
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < columns; j++) {
                    const int64_t at = group.items[k] * stride.item + i * stride.row + j * stride.column;
                    put(data[at], from[i * columns + j][k]);
                }
    });
}

// Contiguous float64 outputs and inputs of the R x R part, `count` values an item.
Tensor doubles(const double *data, int64_t count) { return {(char *)data, FLOAT64, {0, count, 1}}; }
void scatter(const Lanes *from, const Tensor &t, const Group &group, int64_t rows, int64_t columns) {
    scatter(from, t, group, Strides{t.stride[1], columns, t.stride[2]}, rows, columns);
}
void gather(Lanes *to, const Tensor &t, const Group &group, int64_t rows, int64_t columns) {
    gather(to, t, group, Strides{t.stride[1], columns, t.stride[2]}, rows, columns);
}

INLINE Lanes root_of(Lanes a) {
    for (int i = 0; i < 8; i++) a[i] = std::sqrt(a[i]);
    return a;
}
INLINE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

// C⁻¹a by way of L⁻¹, lower, [R][R]; returns |L⁻¹a|².
template <int R> INLINE Lanes solve(const Lanes (&L_inv)[R][R], const Lanes (&a)[R], Lanes (&out)[R]) {
    Lanes square = {};
    for (int j = 0; j < R; j++) out[j] = Lanes{};
    for (int i = 0; i < R; i++) {
        Lanes half = {};
        for (int j = 0; j <= i; j++) half += L_inv[i][j] * a[j];
        square += half * half;
        for (int j = 0; j <= i; j++) out[j] += L_inv[i][j] * half;
    }
    return square;
}

// The inverse of a lower matrix; `inverse_pivot` gives that of its diagonal.
template <int R> INLINE void invert_lower(const Lanes (&L)[R][R], const Lanes (&inverse_pivot)[R], Lanes (&out)[R][R]) {
    for (int i = 0; i < R; i++)
        for (int j = 0; j < R; j++) {
            Lanes sum = {};
            for (int k = j; k < i; k++) sum -= L[i][k] * out[k][j];
            out[i][j] = j < i ? sum * inverse_pivot[i] : j == i ? inverse_pivot[i] : Lanes{};
        }
}

template <int R> void make_group(const Forward &call, const Group &group) {
    const int64_t N = call.N, S = call.S;
    scratch.reserve(Scratch::bytes<Lanes>((R + 3) * N + 1));
    Lanes *P = scratch.take<Lanes>((R + 3) * N + 1), *delta = P + R * N, *other = delta + N, *d = other + N;
    gather(P, call.P, group, of_factor(call.P), N, R);
    gather(d, call.d, group, of_vector(call.d), call.one_d ? 1 : N, 1);
    if (S) {
        gather(delta, call.x, group, of_vector(call.x), N, 1);
        gather(other, call.loc, group, of_vector(call.loc), N, 1);
        for (int64_t n = 0; n < N; n++) delta[n] -= other[n];
    }

    // C and w.
    Logarithm log_D, log_C;
    Lanes C[R][R] = {}, w[R] = {}, diagonal[R], *d_inv = other;
    for (int64_t n = 0; n < N; n++) {
        if (!call.one_d || n == 0) log_D.multiply(d[n]);
        d_inv[n] = 1 / d[call.one_d ? 0 : n];
        for (int i = 0; i < R; i++) {
            const Lanes scaled = P[n * R + i] * d_inv[n];
            for (int j = 0; j <= i; j++) C[i][j] += scaled * P[n * R + j];
            if (S) w[i] += scaled * delta[n];
        }
    }

    // L in the place of C, and L⁻¹.
    Lanes L_inv[R][R], inverse_pivot[R];
    for (int k = 0; k < R; k++) diagonal[k] = C[k][k] += 1;
    for (int k = 0; k < R; k++) {
        log_C.multiply(C[k][k]);
        inverse_pivot[k] = 1 / root_of(C[k][k]);
        for (int i = k + 1; i < R; i++) C[i][k] *= inverse_pivot[k];
        for (int i = k + 1; i < R; i++)
            for (int j = k + 1; j <= i; j++) C[i][j] -= C[i][k] * C[j][k];
    }
    invert_lower<R>(C, inverse_pivot, L_inv);
    scatter(&L_inv[0][0], doubles(call.L_inv, R * R), group, R, R);
    Lanes largest = {};
    for (int j = 0; j < R; j++) {
        Lanes inverse = {};
        for (int k = j; k < R; k++) inverse += L_inv[k][j] * L_inv[k][j];
        largest = larger(diagonal[j] * inverse, largest);
    }
    const Mask rough = log_C.improper | ~(EPS * largest <= good_enough(call.in_double));
    for (int64_t k = 0; k < group.count; k++) {
        const int64_t b = group.items[k];
        call.logdet[b] = log_C.lane(k) + log_D.lane(k) * double(call.one_d ? N : 1);
        call.wide[b] = 1;
        call.rough[b] = rough[k] != 0;
    }
    if (!S) return;

    // r, q, and the last step of v.
    Lanes v[R], g[R], step[R], q = {};
    solve<R>(L_inv, w, v);
    for (int k = 0; k < R; k++) {
        g[k] = -v[k];
        q += v[k] * v[k];
    }
    for (int64_t n = 0; n < N; n++) {
        for (int k = 0; k < R; k++) delta[n] -= P[n * R + k] * v[k];
        const Lanes z = delta[n] * d_inv[n];
        q += delta[n] * z;
        for (int k = 0; k < R; k++) g[k] += P[n * R + k] * z;
    }
    q -= solve<R>(L_inv, g, step);
    for (int k = 0; k < R; k++) v[k] += step[k];
    scatter(&q, doubles(call.q, 1), group, 1, 1);
    scatter(v, doubles(call.v, R), group, 1, R);
    scatter(step, doubles(call.step, R), group, 1, R);
    scatter(delta, {call.residual, call.in_double ? FLOAT64 : FLOAT32, {0, N, 1}}, group, {N, 1, 0}, N, 1);
}

template <int R> void make_group(const Backward &call, const Group &group) {
    const int64_t N = call.N, S = call.S;
    scratch.reserve(Scratch::bytes<Lanes>((2 * R + 4) * N + 1));
    Lanes *P = scratch.take<Lanes>((2 * R + 4) * N + 1), *grad_P = P + R * N, *az = grad_P + R * N, *r = az + N;
    Lanes *grad_d = r + N, *d = grad_d + N;
    gather(P, call.P, group, of_factor(call.P), N, R);
    gather(d, call.d, group, of_vector(call.d), call.one_d ? 1 : N, 1);
    Lanes L_inv[R][R], v[R] = {}, step[R] = {}, a = {}, b;
    gather(&L_inv[0][0], doubles(call.L_inv, R * R), group, R, R);
    gather(&b, doubles(call.b, 1), group, 1, 1);
    for (int64_t n = 0; n < N; n++) r[n] = Lanes{};
    if (S) {
        gather(&a, doubles(call.a, 1), group, 1, 1);
        gather(v, doubles(call.v, R), group, 1, R);
        gather(step, doubles(call.step, R), group, 1, R);
        gather(r, call.residual, group, of_vector(call.residual), N, 1);
    }

    // C⁻¹, and whether a product with it is good enough.
    Lanes C_inv[R][R] = {}, L[R][R], pivot[R], trace = {}, informed = {}, largest = {};
    for (int i = 0; i < R; i++)
        for (int j = 0; j <= i; j++) {
            for (int k = i; k < R; k++) C_inv[i][j] += L_inv[k][i] * L_inv[k][j];
            C_inv[j][i] = C_inv[i][j];
        }
    for (int i = 0; i < R; i++) pivot[i] = 1 / L_inv[i][i];
    invert_lower<R>(L_inv, pivot, L);
    for (int i = 0; i < R; i++) {
        Lanes of_C = {};
        for (int j = 0; j <= i; j++) of_C += L[i][j] * L[i][j];
        trace += C_inv[i][i];
        informed = larger(C_inv[i][i], informed);
        largest = larger(of_C * C_inv[i][i], largest);
    }
    Mask doubtful = (informed > INFORMED) & (EPS * largest > good_enough(call.in_double));

    Lanes smallest = Lanes{} + 1, sum = {}, sum_of_d = {};
    for (int64_t n = 0; n < N; n++) {
        const Lanes d_inv = 1 / d[call.one_d ? 0 : n];
        Lanes h = {}, shift = {}, PC[R];
        for (int i = 0; i < R; i++) {
            PC[i] = Lanes{};
            for (int j = 0; j < R; j++) PC[i] += C_inv[i][j] * P[n * R + j];
            h += PC[i] * P[n * R + i];
            shift += step[i] * P[n * R + i];
        }
        const Lanes z = (r[n] - shift) * d_inv, rest = 1 - h * d_inv;
        az[n] = a * z;
        for (int i = 0; i < R; i++) grad_P[n * R + i] = 2 * (b * d_inv * PC[i] - az[n] * v[i]);
        grad_d[n] = b * rest * d_inv - az[n] * z;
        sum_of_d -= az[n] * z;
        smallest = rest < smallest ? rest : smallest;
        sum += rest;
    }
    const Lanes expected = double(N - R) + trace;
    if (call.grad_d.data && call.one_d) {
        grad_d[0] = sum_of_d + b * expected / d[0];
        if (N <= R) doubtful |= Mask{} - 1;
    } else if (call.grad_d.data) {
        const double tolerance = TOLERANCE * std::sqrt(N > R ? double(N) / R : 1);
        doubtful |= (smallest < SMALL) | (sum - expected > tolerance) | (expected - sum > tolerance);
    }
    for (int64_t k = 0; k < group.count; k++) call.doubtful[group.items[k]] = doubtful[k] != 0;
    if (call.grad_P.data) scatter(grad_P, call.grad_P, group, of_factor(call.grad_P), N, R);
    if (call.grad_d.data)
        scatter(grad_d, call.grad_d, group, {call.grad_d.stride[1], call.grad_d.stride[2], 0}, call.one_d ? 1 : N, 1);
    for (int64_t n = 0; n < N; n++) az[n] *= 2;
    if (call.grad_x.data) scatter(az, call.grad_x, group, {call.grad_x.stride[1], 1, 0}, N, 1);
    for (int64_t n = 0; n < N; n++) az[n] = -az[n];
    if (call.grad_loc.data) scatter(az, call.grad_loc, group, {call.grad_loc.stride[1], 1, 0}, N, 1);
}

// The same tensor at sample s.
Tensor at_sample(const Tensor &t, int64_t s) {
    Tensor moved = t;
    with_type(t, [&](auto *data) { moved.data = (char *)(data + s * t.stride[0]); });
    return moved;
}

template <int R> void make_group(const Samples &call, const Group &group) {
    const int64_t N = call.N;
    scratch.reserve(Scratch::bytes<Lanes>((R + 3) * N + 1));
    Lanes *P = scratch.take<Lanes>((R + 3) * N + 1), *root = P + R * N, *noise = root + N, *y = noise + N, omega[R];
    gather(P, call.P, group, of_factor(call.P), N, R);
    gather(root, call.d, group, of_vector(call.d), call.one_d ? 1 : N, 1);
    for (int64_t n = 0; n < (call.one_d ? 1 : N); n++) root[n] = root_of(root[n]);
    for (int64_t s = 0; s < call.S; s++) {
        const Tensor omega_p = at_sample(call.omega_p, s);
        gather(omega, omega_p, group, of_vector(omega_p), R, 1);
        gather(noise, at_sample(call.omega_d, s), group, of_vector(call.omega_d), N, 1);
        gather(y, at_sample(call.loc, s), group, of_vector(call.loc), N, 1);
        for (int64_t n = 0; n < N; n++) {
            y[n] += root[call.one_d ? 0 : n] * noise[n];
            for (int k = 0; k < R; k++) y[n] += P[n * R + k] * omega[k];
        }
        scatter(y, at_sample(call.y, s), group, of_vector(call.y), N, 1);
    }
}

template <int R> void make_group(const SamplesBackward &call, const Group &group) {
    const int64_t N = call.N;
    scratch.reserve(Scratch::bytes<Lanes>((R + 4) * N + 1));
    Lanes *grad_P = scratch.take<Lanes>((R + 4) * N + 1), *root = grad_P + R * N, *noise = root + N, *g = noise + N;
    Lanes *grad_d = g + N, omega[R];
    gather(root, call.d, group, of_vector(call.d), call.one_d ? 1 : N, 1);
    for (int64_t n = 0; n < (call.one_d ? 1 : N); n++) root[n] = root_of(root[n]);
    for (int64_t n = 0; n < N; n++) grad_d[n] = Lanes{};
    for (int64_t n = 0; n < R * N; n++) grad_P[n] = Lanes{};
    for (int64_t s = 0; s < call.S; s++) {
        const Tensor omega_p = at_sample(call.omega_p, s);
        gather(omega, omega_p, group, of_vector(omega_p), R, 1);
        gather(noise, at_sample(call.omega_d, s), group, of_vector(call.omega_d), N, 1);
        gather(g, at_sample(call.grad_y, s), group, of_vector(call.grad_y), N, 1);
        for (int64_t n = 0; n < N; n++) {
            for (int k = 0; k < R; k++) grad_P[n * R + k] += g[n] * omega[k];
            grad_d[n] += g[n] * noise[n];
            noise[n] = g[n] * root[call.one_d ? 0 : n];
        }
        if (call.grad_omega_d.data)
            scatter(noise, at_sample(call.grad_omega_d, s), group, of_vector(call.grad_omega_d), N, 1);
    }
    for (int64_t n = 1; call.one_d && n < N; n++) grad_d[0] += grad_d[n];
    const int64_t diagonal = call.one_d ? 1 : N;
    for (int64_t n = 0; n < diagonal; n++) grad_d[n] /= 2 * root[n];
    if (call.grad_P.data) scatter(grad_P, call.grad_P, group, of_factor(call.grad_P), N, R);
    if (call.grad_d.data) scatter(grad_d, call.grad_d, group, of_vector(call.grad_d), diagonal, 1);
}

template <class Call, int R = MOST_COLUMNS> void with_columns(const Call &call, const Group &group) {
    if constexpr (R > 1)
        if (call.R < R) return with_columns<Call, R - 1>(call, group);
    make_group<R>(call, group);
}

// A unit is so many items.
constexpr int64_t UNIT = 256;

template <class Call> void in_groups(const Call &call) {
    pool::each(parts(call.B, UNIT), call.threads, [&](int64_t unit) {
        const int64_t last = least(call.B, (unit + 1) * UNIT);
        for (int64_t b = unit * UNIT; b < last; b += 8) with_columns(call, Group(b, call.B));
    });
}

int64_t count(const uint8_t *flags, int64_t B) {
    int64_t sum = 0;
    for (int64_t b = 0; b < B; b++) sum += flags[b];
    return sum;
}

} // namespace

int64_t forward_of_few(const Forward &call) {
    in_groups(call);
    return count(call.rough, call.B);
}

int64_t samples_of_few(const Samples &call) {
    in_groups(call);
    return 0;
}

int64_t samples_backward_of_few(const SamplesBackward &call) {
    in_groups(call);
    return 0;
}

int64_t backward_of_few(const Backward &call) {
    in_groups(call);
    return count(call.doubtful, call.B);
}

} // namespace VARIANT
