// A row folds the chunks (pages) of its context in ascending order; kernels/chunk_attention.py has the formulas. The
// work comes as items: a page, which chunk it is, and the run of rows that have it in their context.
//
// Order of the arithmetic, the contract of this file. q is scaled first: q' = q * (1 / sqrt(D)).
//   score of a slot     over D: ascending FMA chains of 16 products from zero, their results added in ascending order;
//                       lanes run over slots, as a page holds keys [D, B]
//   maximum, sum        of a chunk's visible slots: lane l of 16 takes slots l, l + 16, ..., then the tree of math.h
//   weighted values     per element of D over the visible slots, in chains of 16 like a score; lanes run over D
//   fold                m' = max(m, p.m), a = e^(m - m'), b = e^(p.m - m'), l' = fma(a, l, b * p.l), o' likewise,
//                       from m = -inf, l = o = 0; out = o / l
// Chains of 16 cost nothing and give 0.66 to 0.91 of the rms error of torch's softmax attention; one chain over D = 128
// gave 2.0 times that error.
// A chunk whose scores are all -inf (keys that overflow) weighs nothing. Nothing of this depends on other rows, other
// heads, the item's rows, threads or the tile in registers. Where the rows of an item see different numbers of slots, a
// row's chains take its own slots alone; that a chain with none of them adds +0 to a total changes no bit, because a
// total begins at +0 and so never is -0.
//
// Slots that no row of an item sees and pages that no item names are not read: whatever they hold, NaN too, does not
// reach the result, so fresh pages need no clearing.
//
// Loop order: a job is a range of groups and a range of rows, whose states it alone holds, so jobs need no
// synchronisation; in it items as listed, of an item the groups, then blocks of 32 queries (a row's head): scores of
// the block, its weights, then its values straight into the states, in tiles of 4 queries. So a page is read from
// memory once for all rows of its item that are in the job. Where few rows share an item, a job has all groups, because
// then a page is one stretch of memory; where many do, it has one group, so that it can have many rows. While the first
// tile of queries works, it asks for the next page, line by line.
//
// Measured on one thread of an AMD EPYC (family 26, AVX-512), microseconds with the call from Python, 12 heads of 64,
// pages of 64; before: each row by itself, the same bits. "half": 4 chunks of 8 are shared. Prefill: the last of their
// context's rows.
//   rows x context       1 x 512   8 x 512  64 x 512   shared: 8 x 512  48 x 512  64 x 512   half: 64 x 512
//   before                    31       492     8,825              174     1,001     1,323            4,346
//   items                     34       378     5,650               95       482       633            2,799
//   prefill            512 x 512   512 x 2,048   256 x 512, 8 heads in 2 groups   256 x 512, heads and pages of 128
//   before                 5,607        40,208                            1,591                              10,300
//   items                  2,846        17,706                            1,364                               3,440
// Own pages of 64 x 512 are 201 MB: 36 GB/s (a loop that only reads them gets 49 in sequence, 33 in runs of 16 KB,
// which is what one group of a page is). Two threads with both cores idle: 4,111, shared 64 x 512 373, prefill of 2,048
// 9,080. One row whose pages are in the cache pays a tenth for asking in advance.
//
// Rejected, times slower with 64 rows of own pages of 512: asking for a page in bursts (1.2 and more), asking for it
// into the second-level cache only (1.0 to 1.6), two chains side by side for a single query (1.2). All groups in every
// job: 1.35 times slower for the prefill of 2,048.

#include "chunk_attention.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "threads.h"

namespace selfreward {
namespace {

constexpr int64_t kChain = 16;        // products in one FMA chain: part of the numbers
constexpr int64_t kLine = 16;         // floats in a cache line
constexpr int64_t kBlock = 32;        // queries whose scores are held at a time
constexpr int64_t kStates = 1 << 16;  // floats of a job's queries and states at most: 256 KB, a part of the
                                      // second-level cache
constexpr int64_t kShared = 4;        // queries of a group and item on average from which on a job has one group

// `count` rounded up to whole vectors of 16.
inline int64_t whole(int64_t count) { return (count + 15) / 16 * 16; }

// What one job needs: rows padded to whole vectors.
struct Scratch {
  int64_t width, slots;              // whole(dim), whole(size)
  float *q, *state;                  // q scaled, sum of weighted values [queries, width]
  float *state_max, *state_sum;      // [queries]
  float* scores;                     // then weights [kBlock, slots]
  float *partial_max, *partial_sum;  // [kBlock]
  float *kept, *added;               // factors of the state and of the partial [kBlock]

  static int64_t floats(const ChunkAttentionArguments& a, int64_t queries) {
    return 2 * queries * whole(a.dim) + 2 * whole(queries) + kBlock * (whole(a.size) + 4);
  }

  Scratch(const ChunkAttentionArguments& a, int64_t queries, float* memory)
      : width(whole(a.dim)), slots(whole(a.size)) {
    q = memory;
    state = q + queries * width;
    state_max = state + queries * width;
    state_sum = state_max + whole(queries);
    scores = state_sum + whole(queries);
    partial_max = scores + kBlock * slots;
    partial_sum = partial_max + kBlock;
    kept = partial_sum + kBlock;
    added = kept + kBlock;
  }
};

}  // namespace
}  // namespace selfreward

#define SELFREWARD_BODY "chunk_attention_rows.h"
#include "levels.h"

namespace selfreward {

Level<ChunkAttentionRun> chunk_attention_level(int index) { return level_at(index); }

namespace {

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Groups x rows in parts of at most `groups` x `rows`.
struct Jobs {
  int64_t groups, rows;

  Jobs(const ChunkAttentionArguments& a, int64_t workers) {
    int64_t shared = 0;  // rows, over the items
    for (int64_t i = 0; i < a.item_count; ++i) shared += a.items[4 * i + 3] - a.items[4 * i + 2];
    const int64_t heads = a.heads / a.groups, row = 2 * heads * whole(a.dim);  // floats of a row and group
    if (shared * heads < kShared * a.item_count) {
      const int64_t wanted = workers > 1 ? 2 * workers : 1;
      rows = std::clamp<int64_t>(kStates / (row * a.groups), 1, divided_up(a.rows, wanted));
      groups = divided_up(a.groups, divided_up(wanted, divided_up(a.rows, rows)));
    } else {
      const int64_t wanted = workers > 1 ? 4 * workers : 1;
      groups = 1;
      rows = std::clamp<int64_t>(kStates / row, 1, divided_up(a.rows, divided_up(wanted, a.groups)));
    }
  }

  int64_t count(const ChunkAttentionArguments& a) const {
    return divided_up(a.groups, groups) * divided_up(a.rows, rows);
  }

  ChunkAttentionJob at(const ChunkAttentionArguments& a, int64_t index) const {
    const int64_t ranges = divided_up(a.rows, rows), group = index / ranges * groups, row = index % ranges * rows;
    return {group, std::min(a.groups, group + groups), row, std::min(a.rows, row + rows)};
  }
};

}  // namespace

void chunk_attention(const ChunkAttentionArguments& a, int threads, ChunkAttentionRun run) {
  if (a.rows == 0) return;
  int64_t keys = 0;
  for (int64_t row = 0; row < a.rows; ++row) keys += a.positions[row] + 1;
  // A thread is worth waking for 2^20 multiply-adds, some 40 microseconds.
  const int64_t paying = share_little() ? threads : 2 * keys * a.dim * a.heads >> 20;
  const int64_t workers = std::clamp<int64_t>(paying, 1, threads);
  const Jobs jobs(a, workers);
  const int64_t count = jobs.count(a), floats = Scratch::floats(a, jobs.groups * jobs.rows * (a.heads / a.groups));
  const std::unique_ptr<float[]> memory(new float[size_t(workers * floats + kLine)]);
  float* scratch = memory.get() + kLine - (reinterpret_cast<uintptr_t>(memory.get()) / sizeof(float)) % kLine;
  std::atomic<int64_t> next{0};
  parallel_for(workers, threads, [&](int64_t worker) {
    for (int64_t i = next++; i < count; i = next++) run(a, jobs.at(a, i), scratch + worker * floats);
  });
}

}  // namespace selfreward
