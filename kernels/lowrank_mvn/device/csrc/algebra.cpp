// R x R algebra in float64. Each step is a sum of rows, which the compiler makes vectors of without reordering a sum.
#include "algebra.h"

#include <cmath>

namespace VARIANT {

// U [R, R], upper, in the place of C = UᵀU; false where a pivot is not a positive number.
static bool cholesky(double *U, int64_t R) {
    for (int64_t k = 0; k < R; k++) {
        const double pivot = U[k * R + k];
        if (!(pivot > 0) || !(pivot < INFINITY)) return false;
        const double scale = 1 / std::sqrt(pivot);
        for (int64_t j = k; j < R; j++) U[k * R + j] *= scale;
        for (int64_t i = k + 1; i < R; i++) {
            const double factor = U[k * R + i];
            for (int64_t j = i; j < R; j++) U[i * R + j] -= factor * U[k * R + j];
        }
    }
    return true;
}

// The inverse of a lower matrix whose element (i, j) is at i * row + j * column, a row from the rows above it.
static void invert_lower(const double *L, int64_t row, int64_t column, int64_t R, double *inverse) {
    for (int64_t i = 0; i < R; i++) {
        double *to = inverse + i * R;
        for (int64_t j = 0; j < R; j++) to[j] = 0;
        for (int64_t k = 0; k < i; k++) {
            const double factor = L[i * row + k * column];
            for (int64_t j = 0; j <= k; j++) to[j] -= factor * inverse[k * R + j];
        }
        to[i] = 1;
        const double scale = 1 / L[i * row + i * column];
        for (int64_t j = 0; j <= i; j++) to[j] *= scale;
    }
}

static void unpack(const double *gram, int64_t R, double shift, double *C) {
    for (int64_t i = 0; i < R; i++) {
        for (int64_t j = 0; j <= i; j++) C[j * R + i] = gram[i * (i + 1) / 2 + j];
        C[i * R + i] += 1;
        C[i * R + i] += shift * C[i * R + i];
    }
}

void factorise(const double *gram, int64_t R, double *L_inv, double *log_det, double *work) {
    unpack(gram, R, 0, work);
    bool done = cholesky(work, R);
    if (!done) {
        unpack(gram, R, R * 0x1p-52, work);
        done = cholesky(work, R);
    }
    double sum = 0;
    if (done) {
        invert_lower(work, 1, R, R, L_inv);
        for (int64_t i = 0; i < R; i++) sum -= 2 * std::log(L_inv[i * R + i]);
    }
    *log_det = done && std::isfinite(sum) ? sum : NAN;
    if (!std::isfinite(*log_det))
        for (int64_t i = 0; i < R * R; i++) L_inv[i] = NAN;
}

double solve(const double *L_inv, int64_t R, const double *a, double *out, double *half) {
    double square = 0;
    for (int64_t j = 0; j < R; j++) out[j] = 0;
    for (int64_t i = 0; i < R; i++) {
        const double *row = L_inv + i * R;
        double sum = 0;
        for (int64_t j = 0; j <= i; j++) sum += row[j] * a[j];
        half[i] = sum;
        square += sum * sum;
        for (int64_t j = 0; j <= i; j++) out[j] += sum * row[j];
    }
    return square;
}

void invert(const double *L_inv, int64_t R, double *C_inv) {
    for (int64_t i = 0; i < R * R; i++) C_inv[i] = 0;
    for (int64_t k = 0; k < R; k++) // the lower half of L⁻ᵀL⁻¹
        for (int64_t i = 0; i <= k; i++) {
            const double factor = L_inv[k * R + i];
            for (int64_t j = 0; j <= i; j++) C_inv[i * R + j] += factor * L_inv[k * R + j];
        }
    for (int64_t i = 0; i < R; i++)
        for (int64_t j = 0; j < i; j++) C_inv[j * R + i] = C_inv[i * R + j];
}

void inverse_diagonal(const double *L_inv, int64_t R, double *diagonal) {
    for (int64_t j = 0; j < R; j++) diagonal[j] = 0;
    for (int64_t i = 0; i < R; i++)
        for (int64_t j = 0; j <= i; j++) diagonal[j] += L_inv[i * R + j] * L_inv[i * R + j];
}

void diagonal_of(const double *L_inv, int64_t R, double *diagonal, double *work) {
    invert_lower(L_inv, R, 1, R, work);
    for (int64_t i = 0; i < R; i++) {
        diagonal[i] = 0;
        for (int64_t j = 0; j <= i; j++) diagonal[i] += work[i * R + j] * work[i * R + j];
    }
}

} // namespace VARIANT
