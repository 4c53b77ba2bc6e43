// The product over packed panels for one number format at one instruction level. Included by linear_fp32.h,
// linear_bf16.h and linear_int8.h, inside a namespace, under that level's target options: hence no include guard and
// no #include. The namespace defines
//
//   kLanes, kRegisters   outputs in a vector, vectors in the registers
//   kParts               4-byte pieces of x, and multiplications with a vector of weights, in a unit
//   kChain               units that are multiplied before a sum is finished: part of the numbers
//   Weights load_weights(at, part), Value load_value(at)      kLanes outputs of a unit, one piece of x for all of them
//   Sum start(a, row, chain), dot(value, weights, sum)
//   finish(a, row, chain, sum, total), write(a, output, total, width, out)

// Vectors side by side in a tile of R rows: as many of a panel's as leave room for the weights and one broadcast.
template <int R>
constexpr int columns() {
  int count = kPanel / kLanes;
  while (count > 1 && R * count + (R > 1 ? count : 0) + 1 > kRegisters) count /= 2;
  return count;
}

// R rows x C vectors over `units` (at most kChain) units of one chain, then their sums into the totals. kAhead: cache
// lines to fetch from `ahead` in each unit.
template <int R, int C, int kAhead>
ALWAYS_INLINE void tile(const LinearArguments& a, int64_t row, int64_t chain, const char* x, const char* w,
                        int64_t units, const char* ahead, float* total) {
  const int64_t stride = a.units * kParts * kPiece;
  Sum sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = start(a, row + r, chain);
  for (int64_t unit = 0; unit < units; ++unit, x += kParts * kPiece, w += kUnit, ahead += kAhead * kLine) {
    for (int line = 0; line < kAhead; ++line) PREFETCH(ahead + line * kLine);
    UNROLL for (int part = 0; part < kParts; ++part) {
      Weights weights[C];
      for (int c = 0; c < C; ++c) weights[c] = load_weights(w + c * kLanes * kPiece, part);
      for (int r = 0; r < R; ++r) {
        const Value value = load_value(x + r * stride + part * kPiece);
        for (int c = 0; c < C; ++c) sum[r][c] = dot(value, weights[c], sum[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) finish(a, row + r, chain, sum[r][c], total + r * kPanel + c * kLanes);
}

// R rows x C vectors over the chains of a block.
template <int R, int C, int kAhead>
ALWAYS_INLINE void chains(const LinearArguments& a, int64_t row, int64_t first, const char* w, int64_t units,
                          const char* ahead, float* total) {
  const char* x = static_cast<const char*>(a.x) + (row * a.units + first) * kParts * kPiece;
  for (int64_t unit = 0; unit < units; unit += kChain)
    tile<R, C, kAhead>(a, row, (first + unit) / kChain, x + unit * kParts * kPiece, w + unit * kUnit,
                       units - unit < kChain ? units - unit : kChain, ahead + unit * kAhead * kLine, total);
}

// A group of R rows, the `group`-th of `groups`, over one block of a panel. As much as this block is fetched, kBlock
// units ahead, by the tiles of all groups, each its share, so that the stream of weights does not stop while they
// compute. (Panels lie one behind the other, so every unit is fetched once; fetching the next block instead misses half
// of it where a block of half the size is before it, as every second one of 768 bf16.)
template <int R>
ALWAYS_INLINE void rows_of_block(const LinearArguments& a, int64_t row, int64_t first, const char* w, int64_t units,
                                 int64_t group, int64_t groups, float* total) {
  constexpr int C = columns<R>(), kTiles = kPanel / (C * kLanes), kLines = kUnit / kLine;
  const int64_t share = groups * kTiles >= kLines ? 1 : groups * kTiles * 2 >= kLines ? 2 : kLines;
  for (int i = 0; i < kTiles; ++i) {
    const int64_t done = (group * kTiles + i) * share;
    const char* ahead = w + kBlock * kUnit + units * done * kLine;
    const char* at = w + i * C * kLanes * kPiece;
    float* to = total + i * C * kLanes;
    if (done >= kLines)
      chains<R, C, 0>(a, row, first, at, units, w, to);
    else if (share == 1)
      chains<R, C, 1>(a, row, first, at, units, ahead, to);
    else if (share == 2)
      chains<R, C, 2>(a, row, first, at, units, ahead, to);
    else
      chains<R, C, kLines>(a, row, first, at, units, ahead, to);
  }
}

// Groups of at most kGroup rows, sizes as equal as can be.
NOINLINE void panels(const LinearArguments& a, int64_t first_panel, int64_t last_panel) {
  alignas(64) float totals[kRows * kPanel];
  for (int64_t section = 0; section < a.rows; section += kRows) {
    const int64_t rows = a.rows - section < kRows ? a.rows - section : kRows;
    const int64_t groups = (rows + kGroup - 1) / kGroup;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      for (int64_t first = 0; first < a.units; first += kBlock) {
        const int64_t units = a.units - first < kBlock ? a.units - first : kBlock;
        const char* w = static_cast<const char*>(a.packed) + (panel * a.units + first) * kUnit;
        for (int64_t group = 0; group < groups; ++group) {
          const int64_t row = rows * group / groups, size = rows * (group + 1) / groups - row;
          float* total = totals + row * kPanel;
          switch (size) {
            case 1:
              rows_of_block<1>(a, section + row, first, w, units, group, groups, total);
              break;
            case 2:
              rows_of_block<2>(a, section + row, first, w, units, group, groups, total);
              break;
            case 3:
              rows_of_block<3>(a, section + row, first, w, units, group, groups, total);
              break;
            case 4:
              rows_of_block<4>(a, section + row, first, w, units, group, groups, total);
              break;
            case 5:
              rows_of_block<5>(a, section + row, first, w, units, group, groups, total);
              break;
            default:
              rows_of_block<6>(a, section + row, first, w, units, group, groups, total);
          }
        }
      }
      const int64_t o = panel * kPanel, width = a.outputs - o < kPanel ? a.outputs - o : kPanel;
      for (int64_t row = 0; row < rows; ++row)
        write(a, o, totals + row * kPanel, width, a.out + (section + row) * a.outputs + o);
    }
  }
}
