// One instruction level's 8-bit linear: included by linear_int8.cpp, behind the level's math.h and Integers. Weights
// are stored with 128 added, which the unsigned operand of the dot instruction wants, so a group's sum starts at -128 *
// (sum of x) and is exact.

constexpr int kRegisters = SELFREWARD_LANES == 16 ? 32 : 8;  // 8 lanes: two of its 16 are a Vec
constexpr int64_t kChain = kInt8Group / 4;

using Sum = Integers;

ALWAYS_INLINE Sum start(const LinearArguments& a, int64_t row, int64_t group) {
  return Integers::broadcast(a.starts[row * (a.units / kChain) + group]);
}

// total = fma(sum, the group's scale, total), from 0
ALWAYS_INLINE void finish(const LinearArguments& a, int64_t row, int64_t group, const Sum& sum, float* total) {
  const Vec scale = Vec::broadcast(a.x_scales[row * (a.units / kChain) + group]);
  fma(sum.floats(), scale, group ? Vec::load(total) : Vec::broadcast(0.0f)).store(total);
}

ALWAYS_INLINE void write(const LinearArguments& a, int64_t output, const float* total, int64_t width, float* out) {
  for (int64_t o = 0; o < width; ++o) out[o] = total[o] * a.scales[output + o];
}

#include "linear_panels.h"

// A group of at most 64 values: whole numbers, the sum of them, and the scale. A group whose largest magnitude is below
// 2^-100 counts as zeros; one with a NaN or an infinity has a NaN for its scale, which makes the row NaN.
ALWAYS_INLINE float quantise(const float* x, int64_t count, int32_t* whole, int32_t* sum) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7FFFFFFF;
    largest = bits > largest ? bits : largest;  // as integers, so that NaN is above all numbers
  }
  float magnitude;
  std::memcpy(&magnitude, &largest, sizeof magnitude);
  const bool finite = largest < 0x7F800000, counts = finite && magnitude >= 0x1p-100f;
  const float inverse = counts ? 127.0f / magnitude : 0.0f;
  int32_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float shifted = (counts ? x[i] : 0.0f) * inverse + 0x1.8p23f;  // its low bits: the nearest integer
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    whole[i] = bits - 0x4B400000;
    total += whole[i];
  }
  *sum = total;
  return counts ? magnitude / 127.0f : finite ? 0.0f : std::nanf("");
}

ALWAYS_INLINE uint32_t low(int32_t whole, int bits, int place) {
  return (uint32_t(whole) & ((1u << bits) - 1)) << place;
}

void prepare(const LinearPrepare& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row)
    for (int64_t group = 0; group < p.groups; ++group) {
      const int64_t k = group * kInt8Group, count = p.depth - k < kInt8Group ? p.depth - k : kInt8Group;
      const float* x = p.x + row * p.depth + k;
      alignas(64) int32_t whole[kInt8Group] = {};
      int32_t sum;
      p.scales[row * p.groups + group] =
          count == kInt8Group ? quantise(x, kInt8Group, whole, &sum) : quantise(x, count, whole, &sum);
      p.starts[row * p.groups + group] = -128 * sum;
      uint32_t* to = p.to + (row * p.units + group * kChain) * kParts;
      for (int64_t i = 0; i < kChain; ++i) {
        const int32_t* q = whole + 4 * i;
        if (kParts == 1) {
          to[i] = low(q[0], 8, 0) | low(q[1], 8, 8) | low(q[2], 8, 16) | low(q[3], 8, 24);
        } else {  // 16 bits, as the even and the odd bytes of a unit's weights are widened
          to[2 * i] = low(q[0], 16, 0) | low(q[2], 16, 16);
          to[2 * i + 1] = low(q[1], 16, 0) | low(q[3], 16, 16);
        }
      }
    }
}

LinearKernel run() { return {prepare, panels, kParts, SELFREWARD_INT8_RATE}; }
