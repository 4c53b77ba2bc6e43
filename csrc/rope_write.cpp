// RoPE and the write to the pages in one pass over q, k and v. The rounding is that of kernels/rope.py: no FMA.
//
// Loop order: groups are shared out to the threads, each with its query heads and its part of every page, so no two
// threads write the same place and the copies need not wait for other threads. Then blocks of 16 rows, groups, rows:
// neighbouring rows of a sequence write neighbouring slots, so a key page's lines (a feature has one for 16 slots) are
// fetched once for the block.
//
// Measured on one thread of an AMD EPYC (family 26, AVX-512), microseconds with the call from Python, 12 heads of 64,
// pages of 64; torch: rope_write_reference. Decode: every row has a page of its own, and a key touches 64 lines of it.
//                     decode: 1     8    64   prefill: 512
//   torch                    39    53   158          2,421
//   native                   13    19    62            213

#include "rope_write.h"

#include <algorithm>

#include "runs.h"

namespace selfreward {
namespace {

constexpr int64_t kRows = 16;

}  // namespace
}  // namespace selfreward

#define SELFREWARD_BODY "rope_write_groups.h"
#include "levels.h"

namespace selfreward {

Level<RopeWriteGroups> rope_write_level(int index) { return level_at(index); }

void rope_write(const RopeWriteArguments& a, int threads, RopeWriteGroups groups) {
  int64_t copied = 0;  // slots
  for (int64_t i = 0; i < a.copy_count; ++i) copied += a.copies[3 * i + 2];
  const int64_t cost = 8 * a.dim * (a.rows * (a.heads / a.groups + 4) + copied);
  parallel_runs(Runs(a.groups, cost, threads), threads,
                [&](int64_t, int64_t first, int64_t last) { groups(a, first, last); });
}

}  // namespace selfreward
