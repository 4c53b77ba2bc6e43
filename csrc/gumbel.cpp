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

#include "noise.h"
#include "philox.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SELFREWARD_X86 1
#endif

namespace selfreward {
namespace {

constexpr int64_t kBlock = 64;

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
