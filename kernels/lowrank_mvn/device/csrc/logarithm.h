// The logarithm of a product of many numbers.
#pragma once

#include <cmath>

#include "vectors.h"

namespace VARIANT {

// A product in each of eight lanes: significands are multiplied and exponents added, so that one logarithm is taken for
// all. NaN where a number is not positive and finite.
struct Logarithm {
    Eight<double> product = Eight<double>{} + 1;
    Eight<int64_t> exponents = {}, improper = {};

    INLINE void multiply(Eight<double> a) {
        improper |= ~((a > 0) & (a < INFINITY));
        product *= a;
        const Eight<int64_t> bits = (Eight<int64_t>)product;
        exponents += ((bits >> 52) & 0x7FF) - 1023;
        product = (Eight<double>)((bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000);
    }
    double lane(int i) const { return improper[i] ? NAN : std::log(product[i]) + double(exponents[i]) * M_LN2; }
    double total() const {
        double sum = 0;
        for (int i = 0; i < 8; i++) sum += lane(i);
        return sum;
    }
};

} // namespace VARIANT
