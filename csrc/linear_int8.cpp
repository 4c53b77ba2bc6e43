#include "linear_int8.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "compiler.h"
#include "linear_pack.h"
#include "linear_sizes.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SELFREWARD_X86 1
#include <immintrin.h>
#endif

namespace selfreward {
namespace {

namespace portable {
#define SELFREWARD_LANES 1
#define SELFREWARD_INT8_RATE 2
#include "math.h"

constexpr int kParts = 1;

struct Weights {
  uint8_t byte[4 * kLanes];
};
struct Value {
  int8_t byte[4];
};
struct Integers {
  int32_t lane[kLanes];
  static Integers broadcast(int32_t value) {
    Integers sum;
    for (int32_t& lane : sum.lane) lane = value;
    return sum;
  }
  Vec floats() const {
    Vec x;
    for (int i = 0; i < kLanes; ++i) x.lane[i] = float(lane[i]);
    return x;
  }
};
ALWAYS_INLINE Weights load_weights(const char* at, int) {
  Weights weights;
  std::memcpy(weights.byte, at, sizeof weights.byte);
  return weights;
}
ALWAYS_INLINE Value load_value(const char* at) {
  Value value;
  std::memcpy(value.byte, at, sizeof value.byte);
  return value;
}
ALWAYS_INLINE Integers dot(const Value& value, const Weights& weights, Integers sum) {
  for (int i = 0; i < 4 * kLanes; ++i) sum.lane[i / 4] += value.byte[i % 4] * weights.byte[i];
  return sum;
}

#include "linear_int8_run.h"
#undef SELFREWARD_LANES
#undef SELFREWARD_INT8_RATE
}  // namespace portable

#ifdef SELFREWARD_X86

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define SELFREWARD_LANES 8
#define SELFREWARD_INT8_RATE 60
// clang-format off: in this order
#include "math.h"
#include "linear_int8_pairs.h"
// clang-format on

constexpr int kParts = 2;

// The even bytes of a unit's weights, then the odd ones, widened to 16 bits: no sum of products can overflow.
ALWAYS_INLINE __m256i half(__m256i quads, int part) {
  return part == 0 ? _mm256_and_si256(quads, _mm256_set1_epi16(0xFF)) : _mm256_srli_epi16(quads, 8);
}
ALWAYS_INLINE Weights load_weights(const char* at, int part) {
  const Weights quads = load_quads(at);
  return {half(quads.low, part), half(quads.high, part)};
}
ALWAYS_INLINE Integers dot(const Value& value, const Weights& weights, const Integers& sum) {
  return {_mm256_add_epi32(sum.low, _mm256_madd_epi16(weights.low, value.v)),
          _mm256_add_epi32(sum.high, _mm256_madd_epi16(weights.high, value.v))};
}

#include "linear_int8_run.h"
#undef SELFREWARD_INT8_RATE
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avxvnni,avx2,fma")
namespace avxvnni {
#define SELFREWARD_INT8_RATE 65
// clang-format off: in this order
#include "math.h"
#include "linear_int8_pairs.h"
// clang-format on

constexpr int kParts = 1;

ALWAYS_INLINE Weights load_weights(const char* at, int) { return load_quads(at); }
ALWAYS_INLINE Integers dot(const Value& value, const Weights& weights, Integers sum) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.low) : "x"(weights.low), "x"(value.v));  // as for AVX-512
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.high) : "x"(weights.high), "x"(value.v));
  return sum;
}

#include "linear_int8_run.h"
#undef SELFREWARD_LANES
#undef SELFREWARD_INT8_RATE
}  // namespace avxvnni
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vnni,avx2,fma")
namespace avx512vnni {
#define SELFREWARD_LANES 16
#define SELFREWARD_INT8_RATE 100
#include "math.h"

constexpr int kParts = 1;

struct Weights {
  __m512i v;
};
struct Value {
  __m512i v;
};
struct Integers {
  __m512i v;
  static Integers broadcast(int32_t value) { return {_mm512_set1_epi32(value)}; }
  Vec floats() const { return {_mm512_maskz_cvtepi32_ps(0xFFFF, v)}; }
};
ALWAYS_INLINE Weights load_weights(const char* at, int) { return {_mm512_loadu_si512(at)}; }
ALWAYS_INLINE Value load_value(const char* at) {
  int32_t value;
  std::memcpy(&value, at, sizeof value);
  return {_mm512_set1_epi32(value)};
}
// Not the intrinsic: GCC 12 copies every sum in every step of it and so runs out of registers (64 rows at 334 GFLOP/s).
ALWAYS_INLINE Integers dot(const Value& value, const Weights& weights, Integers sum) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(weights.v), "v"(value.v));
  return sum;
}

#include "linear_int8_run.h"
#undef SELFREWARD_LANES
#undef SELFREWARD_INT8_RATE
}  // namespace avx512vnni
#pragma GCC pop_options

#endif

struct Quad {
  uint8_t byte[4];
};

constexpr uint8_t kZero = 128;

// One output's weights to the nearest of 255 multiples of its scale, plus 128, the depth padded. As in x, weights below
// 2^-100 count as zeros and a NaN or an infinity makes the scale NaN.
float quantise_weights(const float* w, int64_t depth, std::vector<Quad>& to) {
  float largest = 0;
  bool finite = true;
  for (int64_t k = 0; k < depth; ++k) {
    finite = finite && std::isfinite(w[k]);
    largest = std::max(largest, std::fabs(w[k]));
  }
  const bool counts = finite && largest >= 0x1p-100f;
  const float scale = largest / 127.0f;
  uint8_t* bytes = to[0].byte;
  for (int64_t k = 0; k < depth; ++k) bytes[k] = counts ? uint8_t(int(std::nearbyint(w[k] / scale)) + kZero) : kZero;
  return counts ? scale : finite ? 0.0f : std::nanf("");
}

}  // namespace

void linear_pack_int8(const float* w, int64_t outputs, int64_t depth, int64_t first, uint8_t* packed, float* scales) {
  const int64_t units = (depth + kInt8Group - 1) / kInt8Group * kInt8Group / 4;
  std::vector<Quad> row(size_t(units), Quad{{kZero, kZero, kZero, kZero}});
  for (int64_t o = 0; o < outputs; ++o) {
    const int64_t output = first + o;
    scales[output] = quantise_weights(w + o * depth, depth, row);
    Quad* to = reinterpret_cast<Quad*>(packed) + output / kPanel * kPanel * units + output % kPanel;
    for (int64_t unit = 0; unit < units; ++unit) to[unit * kPanel] = row[size_t(unit)];
  }
}

Level<LinearKernel> linear_int8_level(int index) {
#ifdef SELFREWARD_X86
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni") && index-- == 0)
    return {"avx512vnni", avx512vnni::run()};
  if (fma && __builtin_cpu_supports("avxvnni") && index-- == 0) return {"avxvnni", avxvnni::run()};
  if (fma && index-- == 0) return {"avx2", avx2::run()};
#endif
  if (index == 0) return {"portable", portable::run()};
  return {"", {}};
}

}  // namespace selfreward
