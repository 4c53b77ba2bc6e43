// The product over packed panels for one instruction level. Included by linear.cpp once per level, inside a namespace
// that defines `Vec` (zero, load, store, add, fma over kLanes outputs) and kRegisters, under that level's target
// options: hence no include guard and no #include.

// Vectors side by side in a tile of R rows: as many of a panel's as leave room for the weights and one broadcast.
template <int R>
constexpr int columns() {
  int count = kPanel / kLanes;
  while (count > 1 && R * count + (R > 1 ? count : 0) + 1 > kRegisters) count /= 2;
  return count;
}

// R rows x C vectors over `depth` (at most kBlock) steps: one FMA chain from zero for each element, then its sum into
// the totals. kAhead: also fetch the panel's next block, at the same pace.
template <int R, int C, bool kAhead>
ALWAYS_INLINE void tile(const float* x, int64_t stride, const float* w, int64_t depth, bool first, float* total) {
  Vec sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = Vec::zero();
  for (int64_t k = 0; k < depth; ++k, w += kPanel) {
    if (kAhead)
      for (int c = 0; c < C * kLanes; c += kLine) PREFETCH(w + kBlock * kPanel + c);
    Vec weight[C];
    for (int c = 0; c < C; ++c) weight[c] = Vec::load(w + c * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec value = Vec::broadcast(x[r * stride + k]);
      for (int c = 0; c < C; ++c) sum[r][c] = Vec::fma(value, weight[c], sum[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      float* at = total + r * kPanel + c * kLanes;
      (first ? sum[r][c] : Vec::add(Vec::load(at), sum[r][c])).store(at);
    }
}

template <int R>
ALWAYS_INLINE void rows_of_panel(const float* x, int64_t stride, const float* w, int64_t depth, bool first, bool ahead,
                                 float* total) {
  constexpr int C = columns<R>();
  for (int64_t o = 0; o < kPanel; o += C * kLanes)
    if (ahead)
      tile<R, C, true>(x, stride, w + o, depth, first, total + o);
    else
      tile<R, C, false>(x, stride, w + o, depth, first, total + o);
}

// Groups of at most kGroup rows, sizes as equal as can be.
void panels(const LinearArguments& a, int64_t first_panel, int64_t last_panel) {
  alignas(64) float totals[kRows * kPanel];
  for (int64_t start = 0; start < a.rows; start += kRows) {
    const int64_t rows = a.rows - start < kRows ? a.rows - start : kRows;
    const int64_t groups = (rows + kGroup - 1) / kGroup;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      for (int64_t k = 0; k < a.depth; k += kBlock) {
        const int64_t depth = a.depth - k < kBlock ? a.depth - k : kBlock;
        const float* w = a.packed + (panel * a.depth + k) * kPanel;
        for (int64_t group = 0; group < groups; ++group) {
          const int64_t row = rows * group / groups, size = rows * (group + 1) / groups - row;
          const float* x = a.x + (start + row) * a.depth + k;
          float* total = totals + row * kPanel;
          const bool ahead = group == 0;
          switch (size) {
            case 1:
              rows_of_panel<1>(x, a.depth, w, depth, k == 0, ahead, total);
              break;
            case 2:
              rows_of_panel<2>(x, a.depth, w, depth, k == 0, ahead, total);
              break;
            case 3:
              rows_of_panel<3>(x, a.depth, w, depth, k == 0, ahead, total);
              break;
            case 4:
              rows_of_panel<4>(x, a.depth, w, depth, k == 0, ahead, total);
              break;
            case 5:
              rows_of_panel<5>(x, a.depth, w, depth, k == 0, ahead, total);
              break;
            default:
              rows_of_panel<6>(x, a.depth, w, depth, k == 0, ahead, total);
          }
        }
      }
      const int64_t o = panel * kPanel, width = a.outputs - o < kPanel ? a.outputs - o : kPanel;
      for (int64_t row = 0; row < rows; ++row)
        std::memcpy(a.out + (start + row) * a.outputs + o, totals + row * kPanel, size_t(width) * sizeof(float));
    }
  }
}
