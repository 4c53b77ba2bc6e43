// Gumbel noise from Philox words: u = (x + 1/2) / 2^32, E = -log(1 - u), noise = -log(E), rounded to fp32 at the end.
//
// Everything before the last rounding is double precision from + - * / and bit operations only, without FMA
// (-ffp-contract=off), so AVX-512, AVX2 and portable code and the torch reference in kernels/gumbel.py give the same
// bits. 1 - u is exact in a double, and its log keeps relative precision for small u because f = m - 1 is exact.
//
// Loop order: blocks of 64 counters (256 tokens), words first, then the two logs over the flat block, so that both
// loops vectorise. Integers become doubles by writing them into a mantissa (exact), which every level has in vector
// form; a plain conversion of 64-bit or unsigned integers has none below AVX-512.

#include "gumbel.h"

#include <cstring>

#include "philox.h"

#ifdef __FAST_MATH__
#error "built with -ffast-math: the noise would differ between instruction levels"
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define SELFREWARD_X86 1
#endif

#ifdef __GNUC__
#define ALWAYS_INLINE inline __attribute__((always_inline))  // into each level, to be compiled for its instructions
#else
#define ALWAYS_INLINE inline
#endif

namespace selfreward {
namespace {

constexpr int64_t kBlock = 64;
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

ALWAYS_INLINE float gumbel_of_word(uint32_t word) {
  const double reversed = from_bits(kTwo52 | uint32_t(~word)) - 0x1p52;  // 2^32 - 1 - word
  const double one_minus_u = (reversed + 0.5) * 0x1p-32;
  return float(-plain_log(-plain_log(one_minus_u)));
}

ALWAYS_INLINE void gumbel_row(uint64_t seed, uint32_t position, uint32_t candidate, uint32_t stream, int64_t vocab,
                              float* out) {
  const uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  uint32_t words[4 * kBlock];
  float noise[4 * kBlock];
  for (int64_t start = 0; start < vocab; start += 4 * kBlock) {
    const uint32_t first = uint32_t(start / 4);
    for (uint32_t i = 0; i < kBlock; ++i) {
      const Words w = philox({{position, candidate, first + i, stream}}, key0, key1);
      for (int j = 0; j < 4; ++j) words[4 * i + j] = w.w[j];
    }
    for (int64_t i = 0; i < 4 * kBlock; ++i) noise[i] = gumbel_of_word(words[i]);
    const int64_t count = vocab - start < 4 * kBlock ? vocab - start : 4 * kBlock;
    std::memcpy(out + start, noise, size_t(count) * sizeof(float));
  }
}

void portable(uint64_t seed, uint32_t position, uint32_t candidate, uint32_t stream, int64_t vocab, float* out) {
  gumbel_row(seed, position, candidate, stream, vocab, out);
}

#ifdef SELFREWARD_X86
__attribute__((target("avx2"))) void avx2(uint64_t seed, uint32_t position, uint32_t candidate, uint32_t stream,
                                          int64_t vocab, float* out) {
  gumbel_row(seed, position, candidate, stream, vocab, out);
}

__attribute__((target("avx512f"))) void avx512(uint64_t seed, uint32_t position, uint32_t candidate, uint32_t stream,
                                               int64_t vocab, float* out) {
  gumbel_row(seed, position, candidate, stream, vocab, out);
}
#endif

}  // namespace

GumbelLevel gumbel_level(int index) {
#ifdef SELFREWARD_X86
  if (__builtin_cpu_supports("avx512f") && index-- == 0) return {"avx512", avx512};
  if (__builtin_cpu_supports("avx2") && index-- == 0) return {"avx2", avx2};
#endif
  if (index == 0) return {"portable", portable};
  return {"", nullptr};
}

}  // namespace selfreward
