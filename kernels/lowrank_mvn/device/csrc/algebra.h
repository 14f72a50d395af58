// R x R algebra in float64.
#pragma once

#include "vectors.h"

namespace VARIANT {

// Of C = I + gram = LLᵀ, whose lower half is packed in rows: L⁻¹ [R, R], zeros above its diagonal, and log|C|; NaN
// where C is not finite. Where rounding has left C indefinite, R units in the last place of its diagonal are added to
// it: L⁻¹ is then no more than a start, and `largest_error` says so. `work` has R * R places.
void factorise(const double *gram, int64_t R, double *L_inv, double *log_det, double *work);

// C⁻¹a = L⁻ᵀ(L⁻¹a), and |L⁻¹a|²; `out` and `half` have R places. An explicit C⁻¹ would lose what is small in it.
double solve(const double *L_inv, int64_t R, const double *a, double *out, double *half);

// C⁻¹ [R, R].
void invert(const double *L_inv, int64_t R, double *C_inv);

// diag C⁻¹ [R].
void inverse_diagonal(const double *L_inv, int64_t R, double *diagonal);

// diag C [R], of L; `work` has R * R places.
void diagonal_of(const double *L_inv, int64_t R, double *diagonal, double *work);

} // namespace VARIANT
