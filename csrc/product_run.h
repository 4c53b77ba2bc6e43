// One instruction level's product: included by levels.h.

constexpr int64_t kWidth = 64;   // columns of a panel
constexpr int64_t kChain = 256;  // units of the depth in one chain

// Vectors side by side in a tile of R rows: as many of a panel's as leave room for b's and one of a's. An AVX2 Vec is two
// of its 16 registers.
template <int R>
constexpr int vectors() {
  constexpr int kRegisters = SELFREWARD_LANES == 16 ? 32 : 8;
  int count = int(kWidth) / kLanes;
  while (count > 1 && R * count + count + 1 > kRegisters) count /= 2;
  return count;
}

// R rows x C vectors over `units` of one chain; the sums are the totals, or are added to them.
template <int R, int C, bool Packed>
ALWAYS_INLINE void tile(const float* a, int64_t row, const float* b, int64_t units, bool first, float* total) {
  Vec sum[R][C];
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int c = 0; c < C; ++c) sum[r][c] = Vec::broadcast(0.0f);
  for (int64_t k = 0; k < units; ++k, b += kWidth, a += Packed ? kProductGroup : 1) {
    Vec x[C];
    UNROLL for (int c = 0; c < C; ++c) x[c] = Vec::load(b + c * kLanes);
    UNROLL for (int r = 0; r < R; ++r) {
      const Vec value = Vec::broadcast(a[Packed ? r : r * row]);
      UNROLL for (int c = 0; c < C; ++c) sum[r][c] = fma(value, x[c], sum[r][c]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int c = 0; c < C; ++c) {
    float* at = total + r * kWidth + c * kLanes;
    (first ? sum[r][c] : Vec::load(at) + sum[r][c]).store(at);
  }
}

template <int R, bool Packed>
NOINLINE void group(const float* a, int64_t row, const float* b, int64_t units, bool first, float* total) {
  constexpr int C = vectors<R>();
  for (int64_t c = 0; c < kWidth; c += C * kLanes) tile<R, C, Packed>(a, row, b + c, units, first, total + c);
}

template <bool Packed>
ALWAYS_INLINE void section(const ProductBlock& p, int64_t row, int64_t rows, int64_t panel, float* totals) {
  for (int64_t k = 0; k < p.depth; k += kChain) {
    const int64_t units = p.depth - k < kChain ? p.depth - k : kChain;
    const float* b = p.b + (panel * p.depth + k) * kWidth;
    for (int64_t r = 0; r < rows; r += kProductGroup) {
      const float* a = p.a + (Packed ? (row + r) * p.depth + k * kProductGroup : (row + r) * p.row + k);
      float* total = totals + r * kWidth;
      switch (rows - r) {
        case 1:
          group<1, Packed>(a, p.row, b, units, k == 0, total);
          break;
        case 2:
          group<2, Packed>(a, p.row, b, units, k == 0, total);
          break;
        case 3:
          group<3, Packed>(a, p.row, b, units, k == 0, total);
          break;
        case 4:
          group<4, Packed>(a, p.row, b, units, k == 0, total);
          break;
        case 5:
          group<5, Packed>(a, p.row, b, units, k == 0, total);
          break;
        default:
          group<6, Packed>(a, p.row, b, units, k == 0, total);
      }
    }
  }
}

void run(const ProductBlock& p, int64_t index, int64_t first, int64_t last) {
  alignas(64) float totals[kProductSection * kWidth];
  const int64_t row = index * kProductSection, rows = p.rows - row < kProductSection ? p.rows - row : kProductSection;
  for (int64_t panel = first; panel < last; ++panel) {
    p.packed ? section<true>(p, row, rows, panel, totals) : section<false>(p, row, rows, panel, totals);
    const int64_t column = panel * kWidth, width = p.columns - column < kWidth ? p.columns - column : kWidth;
    for (int64_t r = 0; r < rows; ++r) {
      float* out = p.out + (row + r) * p.out_stride + column;
      for (int64_t i = 0; i < width; i += kLanes) {
        const Vec total = Vec::load(totals + r * kWidth + i);
        store_upto(p.add ? load_upto(out + i, width - i) + total : total, out + i, width - i);
      }
    }
  }
}
