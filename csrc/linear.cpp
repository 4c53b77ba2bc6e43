// The sampler's fp32 linear over packed panels of 64 outputs. The order of the sums is the contract: within each block
// of 256 along the depth one ascending FMA chain from zero, block sums added in ascending order. Vector lanes run over
// outputs and the depth is never split over accumulators or threads, so a row's bits depend neither on the other rows
// nor on the instruction level nor on the threads.
//
// Loop order: rows in sections of kRows, then panels (shared out to the threads), then blocks of 256 along the depth,
// then groups of up to 6 rows: a block of a panel is 64 KB, so it stays in the second-level cache while all groups
// pass, and is read from memory once per section. A group keeps 6 rows x 64 outputs in registers (AVX-512: 24 of 32);
// its totals wait in a buffer of the panel between blocks. With few rows the weights' stream bounds the time: every
// group fetches its share of the next block while it computes.
//
// AMD EPYC (Zen 5: family 26, model 2; virtual, 2 cores), depth 768, 32,000 outputs, weights not in cache, one thread;
// torch 2.13's F.linear beside it; FMA peak of one core in the same minute 287 GFLOP/s:
//
//   rows                         1     4    32   128   512
//   AVX-512, GFLOP/s            23    81   265   263   255     1 and 4 rows: 46 and 41 GB/s of weights
//     share of the FMA peak      -   .28   .92   .92   .89
//   AVX2, GFLOP/s               22     -   106   123     -
//   torch, GFLOP/s               9    26    81   106   103
//
// Portable code runs at 1.5. Two threads, both cores idle, 128 rows: 525 (one: 268); 32 rows of small matrices: 372
// with 768 x 768, 401 with 768 x 2,304. Slower variants: only the first group fetches (32 rows: 202), fetching into the
// second-level cache only (12 rows: 151, not 195).

#include "linear.h"

#include <algorithm>
#include <cstring>

#include "linear_pack.h"
#include "linear_sizes.h"
#include "threads.h"

#define SELFREWARD_BODY "linear_fp32.h"
#include "levels.h"

namespace selfreward {

void linear_pack(const float* w, int64_t outputs, int64_t depth, int64_t first, float* packed) {
  pack_units(outputs, depth, first, packed, [=](int64_t o, int64_t k) { return w[o * depth + k]; });
}

void linear_unpack(const float* packed, int64_t outputs, int64_t depth, int64_t first, float* w) {
  unpack_units(outputs, depth, first, packed, [=](int64_t o, int64_t k, float value) { w[o * depth + k] = value; });
}

Level<LinearPanels> linear_level(int index) { return level_at(index); }

void linear(const LinearArguments& a, int threads, LinearPanels panels, double rate) {
  const int64_t count = (a.outputs + kPanel - 1) / kPanel;
  // Microseconds at `rate` units a nanosecond and 40 bytes of weights a nanosecond:
  const double weights = double(count * kPanel) * double(a.units);
  const double least = std::max(double(a.rows) * weights / (rate * 1e3), 4 * weights / 40e3);
  if (least < worth_sharing()) threads = 1;
  // Pieces of neighbouring panels, so that the fetch ahead is of use; several per thread, so that none waits long.
  const int64_t pieces = threads == 1 ? 1 : (count < 8 * threads ? count : 8 * threads);
  parallel_for(pieces, threads, [&](int64_t i) { panels(a, count * i / pieces, count * (i + 1) / pieces); });
}

}  // namespace selfreward
