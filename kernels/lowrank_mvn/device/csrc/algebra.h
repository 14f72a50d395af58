// R x R algebra in float64.
#pragma once

#include "vectors.h"

namespace VARIANT {

// Of C = I + gram, whose lower half is packed in rows: L^-1 [R, R] (zeros above the diagonal), C^-1 [R, R] and log|C|.
// False, and NaN everywhere, where C is not positive definite, which for C >= I means that it is not finite.
// `work` has R * R places.
bool factorise(const double *gram, int64_t R, double *L_inv, double *C_inv, double *log_det, double *work);


} // namespace VARIANT
