// Loop order: blocks of 16 counters (64 units), so that the rounds of 16 Philox calls run side by side in registers.

#include "dropout.h"

#include "philox.h"

namespace selfreward {

constexpr int64_t kCounters = 16;

void dropout_row(uint64_t key, uint64_t segment, uint32_t position, uint32_t site, uint32_t threshold, int64_t units,
                 uint8_t* out) {
  const uint32_t key0 = uint32_t(key), key1 = uint32_t(key >> 32);
  const uint32_t low = uint32_t(segment), high = uint32_t(segment >> 32);
  uint32_t words[4][kCounters];
  for (int64_t start = 0; start < units; start += 4 * kCounters) {
    const uint32_t first = (site << 16) + uint32_t(start / 4);
    for (uint32_t i = 0; i < kCounters; ++i) {
      const Words w = philox({{position, low, high, first + i}}, key0, key1);
      for (int j = 0; j < 4; ++j) words[j][i] = w.w[j];
    }
    const int64_t count = units - start < 4 * kCounters ? units - start : 4 * kCounters;
    for (int64_t u = 0; u < count; ++u) out[start + u] = words[u % 4][u / 4] >= threshold;
  }
}

}  // namespace selfreward
