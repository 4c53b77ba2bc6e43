// One instruction level's bf16 linear: included by levels.h and, with SELFREWARD_BF16_DOT, for the dot instruction.
// That instruction takes two bf16 each of x and w, adds first the odd product and then the even one, rounds after each
// as a fused multiply-add does, and takes and gives numbers below 2^-126 as zero. All levels do the same.

constexpr int kRegisters = SELFREWARD_LANES == 16 ? 32 : 8;  // AVX2: two of its 16 are a Vec
constexpr int64_t kChain = 128;                              // units of two: 256 along the depth

#include "linear_float.h"

using Value = Vec;

ALWAYS_INLINE Value load_value(const char* at) {
  float value;
  std::memcpy(&value, at, sizeof value);
  return Vec::broadcast(value);
}

#ifdef SELFREWARD_BF16_DOT

constexpr int kParts = 1;
using Weights = Vec;

ALWAYS_INLINE Weights load_weights(const char* at, int) { return {_mm512_loadu_ps(at)}; }
// Not the intrinsic: GCC 12 copies every sum in every step of it.
ALWAYS_INLINE Sum dot(const Value& value, const Weights& weights, Sum sum) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(weights.v), "v"(value.v));
  return sum;
}

#else

constexpr int kParts = 2;  // first the odd half, then the even one, both as fp32
using Weights = Vec;

#if SELFREWARD_LANES == 16
ALWAYS_INLINE Weights load_weights(const char* at, int part) {
  const __m512i pairs = _mm512_loadu_si512(at);
  const __m512i half = part == 0 ? _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xFFFF0000)))
                                 : _mm512_maskz_slli_epi32(0xFFFF, pairs, 16);
  return {_mm512_castsi512_ps(half)};
}
#elif SELFREWARD_LANES == 8
ALWAYS_INLINE __m256 half(const char* at, int part) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return _mm256_castsi256_ps(part == 0 ? _mm256_and_si256(pairs, _mm256_set1_epi32(int(0xFFFF0000)))
                                       : _mm256_slli_epi32(pairs, 16));
}
ALWAYS_INLINE Weights load_weights(const char* at, int part) { return {half(at, part), half(at + 32, part)}; }
#else
ALWAYS_INLINE Weights load_weights(const char* at, int part) {
  uint32_t bits[kLanes];
  std::memcpy(bits, at, sizeof bits);
  for (uint32_t& pair : bits) pair = part == 0 ? pair & 0xFFFF0000 : pair << 16;
  Weights weights;
  std::memcpy(weights.lane, bits, sizeof bits);
  return weights;
}
#endif

ALWAYS_INLINE Sum dot(const Value& value, const Weights& weights, const Sum& sum) { return fma(value, weights, sum); }

#endif

#include "linear_panels.h"

// The nearest bf16, ties to even, as an fp32's bits; a NaN stays one.
ALWAYS_INLINE uint32_t rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t nearest = bits + 0x7FFF + (bits >> 16 & 1);
  return ((bits & 0x7FFFFFFF) > 0x7F800000 ? bits | 0x400000 : nearest) & 0xFFFF0000;
}

ALWAYS_INLINE void put(uint32_t even, uint32_t odd, uint32_t* to) {
  if (kParts == 1) {
    to[0] = even >> 16 | odd;
  } else {
    to[0] = odd;
    to[1] = even;
  }
}

void prepare(const LinearPrepare& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const float* x = p.x + row * p.depth;
    uint32_t* to = p.to + row * p.units * kParts;
    const int64_t pairs = p.depth / 2;
    for (int64_t i = 0; i < pairs; ++i) put(rounded(x[2 * i]), rounded(x[2 * i + 1]), to + i * kParts);
    if (p.depth % 2) put(rounded(x[p.depth - 1]), 0, to + pairs * kParts);
  }
}

void flushed_panels(const LinearArguments& a, int64_t first, int64_t last) {
  const FlushSubnormals flush;
  panels(a, first, last);
}

LinearKernel run() { return {prepare, flushed_panels, kParts, SELFREWARD_BF16_RATE}; }
