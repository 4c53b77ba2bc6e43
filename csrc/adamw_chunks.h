// One instruction level's adamw: included by levels.h.

#include "bf16_lanes.h"
#include "philox_lanes.h"

#if SELFREWARD_LANES == 16
ALWAYS_INLINE Vec square_root(Vec x) { return {_mm512_maskz_sqrt_ps(0xFFFF, x.v)}; }
#elif SELFREWARD_LANES == 8
ALWAYS_INLINE Vec square_root(Vec x) { return {_mm256_sqrt_ps(x.low), _mm256_sqrt_ps(x.high)}; }
#else
ALWAYS_INLINE Vec square_root(const Vec& x) {
  return each([&](int i) { return std::sqrt(x.lane[i]); });
}
#endif

// The upper halves of x's bits + r; of what is not finite without r, as 0x7FFFFFFF + r would be -0.0.
ALWAYS_INLINE void store_rounded(Vec x, const uint32_t* r, uint16_t* at) {
  float lane[kLanes];
  uint32_t bits[kLanes];
  x.store(lane);
  std::memcpy(bits, lane, sizeof bits);
  for (int i = 0; i < kLanes; ++i) {
    const bool finite = (bits[i] & 0x7F800000u) != 0x7F800000u;
    at[i] = uint16_t((bits[i] + (finite ? r[i] : 0u)) >> 16);
  }
}

// Sixteen elements, with one random half each.
ALWAYS_INLINE void update(const AdamWArguments& a, const uint32_t* r, uint16_t* weight, const uint16_t* grad,
                          float* mean, float* square) {
  const Vec g = load_bf16(grad) * Vec::broadcast(a.scale);
  const Vec m = Vec::load(mean) * Vec::broadcast(a.beta1) + g * Vec::broadcast(a.rest1);
  const Vec s = Vec::load(square) * Vec::broadcast(a.beta2) + g * g * Vec::broadcast(a.rest2);
  const Vec below = square_root(s) * Vec::broadcast(a.root) + Vec::broadcast(a.eps);
  m.store(mean);
  s.store(square);
  const Vec wide = load_bf16(weight) * Vec::broadcast(a.decay) - m * Vec::broadcast(a.rate) / below;
  store_rounded(wide, r, weight);
}

void run(const AdamWArguments& a, int64_t begin, int64_t end) {
  const int64_t lead = int64_t(a.first % kAdamWChunk);
  uint32_t blocks[kLanes], words[4 * kLanes], r[kAdamWChunk];
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const uint64_t block = a.first / kAdamWChunk * kLanes + uint64_t(chunk) * kLanes;
    for (int l = 0; l < kLanes; ++l) blocks[l] = uint32_t(block) + uint32_t(l);  // aligned to 16: they do not wrap
    philox_lanes(uint32_t(block >> 32), a.number, blocks, a.key, words);
    for (int i = 0; i < 4 * kLanes; ++i) {
      r[2 * i] = words[i] & 0xFFFFu;
      r[2 * i + 1] = words[i] >> 16;
    }
    for (int64_t i = 0; i < kAdamWChunk; i += kLanes) {
      const int64_t at = chunk * kAdamWChunk - lead + i;  // of lane 0
      if (at >= 0 && at + kLanes <= a.count) {
        update(a, r + i, a.weight + at, a.grad + at, a.mean + at, a.square + at);
        continue;
      }
      const int64_t skip = at < 0 ? -at : 0, stop = a.count - at < kLanes ? a.count - at : kLanes;
      if (skip >= stop) continue;
      const size_t n = size_t(stop - skip);
      uint16_t weight[kLanes] = {}, grad[kLanes] = {};
      float mean[kLanes] = {}, square[kLanes] = {};
      std::memcpy(weight + skip, a.weight + at + skip, n * sizeof *weight);
      std::memcpy(grad + skip, a.grad + at + skip, n * sizeof *grad);
      std::memcpy(mean + skip, a.mean + at + skip, n * sizeof *mean);
      std::memcpy(square + skip, a.square + at + skip, n * sizeof *square);
      update(a, r + i, weight, grad, mean, square);
      std::memcpy(a.weight + at + skip, weight + skip, n * sizeof *weight);
      std::memcpy(a.mean + at + skip, mean + skip, n * sizeof *mean);
      std::memcpy(a.square + at + skip, square + skip, n * sizeof *square);
    }
  }
}
