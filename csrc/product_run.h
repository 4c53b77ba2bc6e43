// One instruction level's product: included by levels.h.

#include "product_tile.h"

constexpr int64_t kChain = 256;  // units of the depth in one chain

template <bool Packed>
ALWAYS_INLINE void section(const ProductBlock& p, int64_t row, int64_t rows, int64_t panel, float* totals) {
  for (int64_t k = 0; k < p.depth; k += kChain) {
    const int64_t units = p.depth - k < kChain ? p.depth - k : kChain;
    const float* b = p.b + (panel * p.depth + k) * kWidth;
    for (int64_t r = 0; r < rows; r += kGroup) {
      const float* a = p.a + (Packed ? (row + r) * p.depth + k * kGroup : (row + r) * p.stride + k);
      const int64_t count = rows - r < kGroup ? rows - r : kGroup;
      group<Packed>(a, Packed ? kGroup : p.stride, count, b, kWidth, units, k == 0 && !p.add, totals + r * kWidth);
    }
  }
}

void run(const ProductBlock& p, int64_t index, int64_t first, int64_t last) {
  alignas(64) float totals[kProductSection * kWidth];
  const int64_t row = index * kProductSection, rows = p.rows - row < kProductSection ? p.rows - row : kProductSection;
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t column = panel * kWidth, width = p.columns - column < kWidth ? p.columns - column : kWidth;
    float* out = p.out + row * p.out_stride + column;
    for (int64_t r = 0; p.add && r < rows; ++r)
      for (int64_t i = 0; i < width; i += kLanes)
        load_upto(out + r * p.out_stride + i, width - i).store(totals + r * kWidth + i);
    p.packed ? section<true>(p, row, rows, panel, totals) : section<false>(p, row, rows, panel, totals);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < width; i += kLanes)
        store_upto(Vec::load(totals + r * kWidth + i), out + r * p.out_stride + i, width - i);
  }
}
