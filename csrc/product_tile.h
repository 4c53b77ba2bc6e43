// Small products in registers, for one instruction level: rows of `a` times a panel of up to 64 columns. Included by
// product_run.h and tree_attention_task.h, under the level's target options: hence no include guard and no #include.

constexpr int64_t kWidth = 64;  // floats from a row of a panel to the next
constexpr int kGroup = 6;       // rows that are in registers at a time

// Vectors side by side in a tile of R rows: as many of a panel's as leave room for b's and one of a's. An AVX2 Vec is
// two of its 16 registers.
template <int R>
constexpr int vectors() {
  constexpr int kRegisters = SELFREWARD_LANES == 16 ? 32 : 8;
  int count = int(kWidth) / kLanes;
  while (count > 1 && R * count + count + 1 > kRegisters) count /= 2;
  return count;
}

// R rows x C vectors, one ascending FMA chain from zero over `units`; the sums are the totals, or are added to them.
// Row r at unit k is a[r * stride + k], or a[k * stride + r] Across.
template <int R, int C, bool Across>
ALWAYS_INLINE void tile(const float* a, int64_t stride, const float* b, int64_t units, bool first, float* total) {
  Vec sum[R][C];
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int c = 0; c < C; ++c) sum[r][c] = Vec::broadcast(0.0f);
  for (int64_t k = 0; k < units; ++k, b += kWidth, a += Across ? stride : 1) {
    Vec x[C];
    UNROLL for (int c = 0; c < C; ++c) x[c] = Vec::load(b + c * kLanes);
    UNROLL for (int r = 0; r < R; ++r) {
      const Vec value = Vec::broadcast(a[Across ? r : r * stride]);
      UNROLL for (int c = 0; c < C; ++c) sum[r][c] = fma(value, x[c], sum[r][c]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int c = 0; c < C; ++c) {
    float* at = total + r * kWidth + c * kLanes;
    (first ? sum[r][c] : Vec::load(at) + sum[r][c]).store(at);
  }
}

// R rows x `columns`, rounded up to whole vectors.
template <int R, bool Across>
NOINLINE void tiles(const float* a, int64_t stride, const float* b, int64_t columns, int64_t units, bool first,
                    float* total) {
  constexpr int C = vectors<R>();
  int64_t c = 0;
  for (; columns - c > (C - 1) * kLanes; c += C * kLanes) tile<R, C, Across>(a, stride, b + c, units, first, total + c);
  for (; c < columns; c += kLanes) tile<R, 1, Across>(a, stride, b + c, units, first, total + c);
}

// `rows` rows, at most kGroup.
template <bool Across>
ALWAYS_INLINE void group(const float* a, int64_t stride, int64_t rows, const float* b, int64_t columns, int64_t units,
                         bool first, float* total) {
  switch (rows) {
    case 1:
      return tiles<1, Across>(a, stride, b, columns, units, first, total);
    case 2:
      return tiles<2, Across>(a, stride, b, columns, units, first, total);
    case 3:
      return tiles<3, Across>(a, stride, b, columns, units, first, total);
    case 4:
      return tiles<4, Across>(a, stride, b, columns, units, first, total);
    case 5:
      return tiles<5, Across>(a, stride, b, columns, units, first, total);
    default:
      return tiles<6, Across>(a, stride, b, columns, units, first, total);
  }
}
