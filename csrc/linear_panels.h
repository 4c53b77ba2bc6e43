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
// the totals. kAhead: cache lines to fetch from `ahead` in each step.
template <int R, int C, int kAhead>
ALWAYS_INLINE void tile(const float* x, int64_t stride, const float* w, int64_t depth, bool first, const float* ahead,
                        float* total) {
  Vec sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = Vec::zero();
  for (int64_t k = 0; k < depth; ++k, w += kPanel, ahead += kAhead * kLine) {
    for (int line = 0; line < kAhead; ++line) PREFETCH(ahead + line * kLine);
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

// A group of R rows, the `group`-th of `groups`, over one block of a panel. The block behind it in memory is fetched by
// the tiles of all groups, each its share, so that the stream of weights does not stop while they compute.
template <int R>
ALWAYS_INLINE void rows_of_block(const float* x, int64_t stride, const float* w, int64_t depth, bool first,
                                 int64_t group, int64_t groups, float* total) {
  constexpr int C = columns<R>(), kTiles = kPanel / (C * kLanes), kLines = kPanel / kLine;
  const int64_t share = groups * kTiles >= kLines ? 1 : groups * kTiles * 2 >= kLines ? 2 : kLines;
  for (int i = 0; i < kTiles; ++i) {
    const int64_t done = (group * kTiles + i) * share, o = i * C * kLanes;
    const float* ahead = w + (depth * kLines + depth * done) * kLine;
    if (done >= kLines)
      tile<R, C, 0>(x, stride, w + o, depth, first, w, total + o);
    else if (share == 1)
      tile<R, C, 1>(x, stride, w + o, depth, first, ahead, total + o);
    else if (share == 2)
      tile<R, C, 2>(x, stride, w + o, depth, first, ahead, total + o);
    else
      tile<R, C, kLines>(x, stride, w + o, depth, first, ahead, total + o);
  }
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
          switch (size) {
            case 1:
              rows_of_block<1>(x, a.depth, w, depth, k == 0, group, groups, total);
              break;
            case 2:
              rows_of_block<2>(x, a.depth, w, depth, k == 0, group, groups, total);
              break;
            case 3:
              rows_of_block<3>(x, a.depth, w, depth, k == 0, group, groups, total);
              break;
            case 4:
              rows_of_block<4>(x, a.depth, w, depth, k == 0, group, groups, total);
              break;
            case 5:
              rows_of_block<5>(x, a.depth, w, depth, k == 0, group, groups, total);
              break;
            default:
              rows_of_block<6>(x, a.depth, w, depth, k == 0, group, groups, total);
          }
        }
      }
      const int64_t o = panel * kPanel, width = a.outputs - o < kPanel ? a.outputs - o : kPanel;
      for (int64_t row = 0; row < rows; ++row)
        std::memcpy(a.out + (start + row) * a.outputs + o, totals + row * kPanel, size_t(width) * sizeof(float));
    }
  }
}
