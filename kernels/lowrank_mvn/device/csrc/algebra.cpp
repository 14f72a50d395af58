// R x R algebra in float64. Each step is a sum of rows, which the compiler makes vectors of without reordering a sum.
#include "algebra.h"

#include <cmath>

namespace VARIANT {

// U [R, R], upper, with C = UᵀU; false where a pivot is not a positive number.
static bool cholesky(double *U, int64_t R, double *log_det) {
    double sum = 0;
    for (int64_t k = 0; k < R; k++) {
        const double pivot = U[k * R + k];
        if (!(pivot > 0) || !(pivot < INFINITY)) return false;
        sum += std::log(pivot);
        const double scale = 1 / std::sqrt(pivot);
        for (int64_t j = k; j < R; j++) U[k * R + j] *= scale;
        for (int64_t i = k + 1; i < R; i++) {
            const double factor = U[k * R + i];
            for (int64_t j = i; j < R; j++) U[i * R + j] -= factor * U[k * R + j];
        }
    }
    *log_det = sum;
    return std::isfinite(sum);
}

// L⁻¹ [R, R] by forward substitution, a row from the rows above it.
static void invert(const double *U, int64_t R, double *L_inv) {
    for (int64_t i = 0; i < R; i++) {
        double *row = L_inv + i * R;
        for (int64_t j = 0; j < R; j++) row[j] = 0;
        for (int64_t k = 0; k < i; k++) {
            const double factor = U[k * R + i];
            for (int64_t j = 0; j <= k; j++) row[j] -= factor * L_inv[k * R + j];
        }
        row[i] = 1;
        const double scale = 1 / U[i * R + i];
        for (int64_t j = 0; j <= i; j++) row[j] *= scale;
    }
}

bool factorise(const double *gram, int64_t R, double *L_inv, double *C_inv, double *log_det, double *work) {
    for (int64_t i = 0; i < R; i++)
        for (int64_t j = 0; j <= i; j++) work[j * R + i] = gram[i * (i + 1) / 2 + j] + (i == j);
    if (!cholesky(work, R, log_det)) {
        for (int64_t i = 0; i < R * R; i++) L_inv[i] = C_inv[i] = NAN;
        *log_det = NAN;
        return false;
    }
    invert(work, R, L_inv);
    for (int64_t i = 0; i < R * R; i++) C_inv[i] = 0;
    for (int64_t k = 0; k < R; k++) // C⁻¹ = L⁻ᵀL⁻¹, lower half
        for (int64_t i = 0; i <= k; i++) {
            const double factor = L_inv[k * R + i];
            for (int64_t j = 0; j <= i; j++) C_inv[i * R + j] += factor * L_inv[k * R + j];
        }
    for (int64_t i = 0; i < R; i++)
        for (int64_t j = 0; j < i; j++) C_inv[j * R + i] = C_inv[i * R + j];
    return true;
}

} // namespace VARIANT
