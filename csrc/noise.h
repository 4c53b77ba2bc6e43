// A Philox word as Gumbel noise, and the logarithm and exponential in double precision that the sampler is built on:
// + - * / and bit operations only, without FMA (-ffp-contract=off) and without libm, so that every compiler,
// instruction level and machine gives the same bits. Inlined into the loops of each level, where they vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#include "compiler.h"

namespace selfreward {

constexpr uint64_t kOne = 0x3FF0000000000000ull;       // bits of 1.0
constexpr uint64_t kSqrtHalf = 0x3FE6A09E667F3BCDull;  // bits of sqrt(1/2)
constexpr uint64_t kTwo52 = 0x4330000000000000ull;     // bits of 2^52: or an integer below 2^52 into it to add it

ALWAYS_INLINE double from_bits(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

ALWAYS_INLINE uint64_t to_bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Natural logarithm of a positive normal double; relative error below 1e-14.
ALWAYS_INLINE double plain_log(double x) {
  // Shift the exponent so that the mantissa m lands in [sqrt(1/2), sqrt(2)).
  const uint64_t shifted = to_bits(x) + (kOne - kSqrtHalf);
  const double exponent = from_bits(kTwo52 | (shifted >> 52)) - (0x1p52 + 1023.0);
  const double m = from_bits((shifted & 0x000FFFFFFFFFFFFFull) + kSqrtHalf);
  const double f = m - 1.0;
  const double s = f / (2.0 + f);  // log m = 2 atanh s
  const double z = s * s;          // at most 0.0295: the first term left out is below 1e-15 of the sum
  double series = 1.0 / 17.0;
  series = series * z + 1.0 / 15.0;
  series = series * z + 1.0 / 13.0;
  series = series * z + 1.0 / 11.0;
  series = series * z + 1.0 / 9.0;
  series = series * z + 1.0 / 7.0;
  series = series * z + 1.0 / 5.0;
  series = series * z + 1.0 / 3.0;
  return exponent * 0.6931471805599453 + (s + s) * (1.0 + z * series);
}

// e^x of -700 <= x <= 700: 2^n times the series of e^r, r = x - n ln 2, |r| <= ln 2 / 2; relative error below 1e-14.
// The caller clamps x, in a loop of its own: a branch in here would keep GCC from vectorising.
ALWAYS_INLINE double plain_exp(double x) {
  const double t = x * 1.4426950408889634 + 0x1.8p52;  // an integer in the low bits
  const double n = t - 0x1.8p52;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;  // ln 2 in two parts
  const double r2 = r * r, r4 = r2 * r2;  // in pairs, so that no step waits long; the first term left out: 7e-15
  const double low = (1.0 + r) + r2 * (0.5 + r * (1.0 / 6.0));
  const double middle = (1.0 / 24.0 + r * (1.0 / 120.0)) + r2 * (1.0 / 720.0 + r * (1.0 / 5040.0));
  const double high = (1.0 / 40320.0 + r * (1.0 / 362880.0)) + r2 * (1.0 / 3628800.0 + r * (1.0 / 39916800.0));
  const double series = low + r4 * (middle + r4 * high);
  return series * from_bits((to_bits(t) + 1023) << 52);
}

ALWAYS_INLINE float gumbel_of_word(uint32_t word) {
  const double reversed = from_bits(kTwo52 | uint32_t(~word)) - 0x1p52;  // 2^32 - 1 - word
  const double one_minus_u = (reversed + 0.5) * 0x1p-32;
  return float(-plain_log(-plain_log(one_minus_u)));
}

}  // namespace selfreward
