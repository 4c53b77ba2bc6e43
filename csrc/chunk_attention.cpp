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
// Items of many rows come first, group by group (chunk_attention_group.h): a job is a group and a range of rows, whose
// states it alone holds, so jobs need no synchronisation. It folds its items as listed; of an item the page is widened
// into the first-level cache once, then blocks of 32 queries (a row's head): scores, weights, values into the states.
//
// Items of few rows (chunk_attention_partial.h) are bound by memory: a page is read once, all groups of it as they lie,
// K and V of a group in turn, and every line asks for the same line of the next group's. They become partials, spread
// over the threads item by item, so that one row or one group is enough for all threads; then the partials are folded
// into the states, in order, by ranges of rows. One thread folds an item at once. A row of both kinds has its items of
// many rows first, as those who share a chunk share all before it; where a list has it otherwise, the item behind
// counts as of few.
//
// Measured on one thread of an AMD EPYC (family 26, AVX-512) that was not idle otherwise, pages of 64 out of 600 MB
// that are in no cache, GB/s of the slots seen, each once; before: the version that folded all items job by job, fp32
// alone. A loop that reads 600 MB in order got 42 meanwhile, one that reads random runs of 16 KB 19. MHA of 12 heads of
// 64, but x: 32 of 128; g: 32 of 128 in 8 groups. "8 x 4": 8 prompts of 128 with 4 answers of 1 to 128 each; "8 x 3": 8
// of 512 with 3 answers of 30. Prefill: GFLOP/s of the last 512 rows of a context, where registers alone give 274.
//   rows x context    1 x 2,048  32 x 1,024  1 x 2,048 x  8 x 512 x  8 x 1,024 g   8 x 4   8 x 3   prefill 512   2,048
//   before                 35.9        34.6         30.6       29.3         24.0    26.7    27.0           126     149
//   fp32                   36.0        34.8         30.1       28.5         24.4    25.5    25.4           147     168
//   bf16                   31.2        30.7         27.4       26.6         24.0    18.3    18.7           148     169
// What keeps prefill from the peak: weights 20%, page and queries into place 11%; the products run at 89%.
//
// Rejected: a key in one stretch, as values lie, and its page transposed 16 x 16 in registers: writing 32 rows takes 38
// instead of 97 microseconds, but reading is 1.15 times slower (a page in the cache 1.7 times: the shuffles). All
// groups of a slot together in memory: 1.6 times slower to read, whichever way it is asked for. All keys of a page,
// then all values: 1.1. Asking into the second-level cache, or past it: 1.0. Six queries in registers instead of
// four: 1.0. A thread of its own for a row's state (jobs of rows) leaves threads idle where rows are few.

#include "chunk_attention.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <type_traits>
#include <vector>

#include "runs.h"
#include "scratch.h"
#include "threads.h"

namespace selfreward {
namespace {

constexpr int64_t kChain = 16;          // products in one FMA chain: part of the numbers
constexpr int64_t kBlock = 32;          // queries of a group whose scores are held at a time
constexpr int64_t kMany = 32;           // rows of an item from which on it is folded group by group
constexpr int64_t kStates = 1 << 16;    // floats of a job's queries and states at most: 256 KB, a part of the
                                        // second-level cache
constexpr int64_t kPartials = 1 << 16;  // floats of partials that wait to be folded, for each thread

// `count` rounded up to whole vectors of 16.
inline int64_t whole(int64_t count) { return (count + 15) / 16 * 16; }

// What a job of many rows of one group holds; rows are padded to whole vectors.
struct GroupScratch {
  int64_t width, slots;          // whole(dim), whole(size)
  float *keys, *values;          // of a page [width, slots], [slots, width]
  float *q, *state;              // q scaled, sum of weighted values [queries, width]
  float *max, *sum;              // of the states [queries]
  float* scores;                 // then weights [kBlock, slots]
  float *block_max, *block_sum;  // of the page alone [kBlock]
  float *kept, *added;           // factors of the state and of the page's values [kBlock]
  int64_t floats;

  GroupScratch(const ChunkAttentionArguments& a, int64_t queries, float* memory)
      : width(whole(a.dim)), slots(whole(a.size)), floats(0) {
    const auto take = [&](int64_t count) {
      floats += whole(count);
      return memory ? memory + floats - whole(count) : nullptr;
    };
    keys = take(width * slots), values = take(slots * width);
    q = take(queries * width), state = take(queries * width);
    max = take(queries), sum = take(queries);
    scores = take(kBlock * slots);
    block_max = take(kBlock), block_sum = take(kBlock), kept = take(kBlock), added = take(kBlock);
  }
};

}  // namespace
}  // namespace selfreward

#define SELFREWARD_BODY "chunk_attention_rows.h"
#include "levels.h"

namespace selfreward {

Level<ChunkAttentionRun> chunk_attention_level(int index) { return level_at(index); }

namespace {

using Item = ChunkAttentionItem;

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

thread_local Scratch job_memory, partial_memory, state_memory;

// What the partials or states of some queries take, and where they lie in memory that has them.
int64_t state_floats(const ChunkAttentionArguments& a, int64_t queries) {
  return queries * whole(a.dim) + 2 * whole(queries);
}
ChunkAttentionState state_at(int64_t queries, float* memory) {
  return {memory, memory + whole(queries), memory + 2 * whole(queries)};
}

// The items of many rows, which come first for all of their rows, and the others, cut to less than kMany rows.
struct Work {
  std::vector<Item> many, few;
  std::unique_ptr<bool[]> unfinished;  // [rows]: has an item among the few

  explicit Work(const ChunkAttentionArguments& a) : unfinished(new bool[size_t(a.rows)]()) {
    for (int64_t i = 0; i < a.item_count; ++i) {
      const int64_t* item = a.items + 4 * i;
      const int64_t first = item[2], last = item[3];
      bool* begin = unfinished.get() + first;
      if (last - first >= kMany && std::find(begin, begin + (last - first), true) == begin + (last - first)) {
        many.push_back({item[0], item[1], first, last});
        continue;
      }
      std::fill(begin, begin + (last - first), true);
      for (int64_t row = first; row < last; row += kMany - 1)
        few.push_back({item[0], item[1], row, std::min(last, row + kMany - 1)});
    }
  }
};

// The items of many rows, group by group.
void fold_many(const ChunkAttentionArguments& a, const Work& work, const ChunkAttentionState& states, int64_t workers,
               int threads, const ChunkAttentionKernels& kernels) {
  int64_t first = a.rows, last = 0;
  for (const Item& item : work.many) first = std::min(first, item.first_row), last = std::max(last, item.last_row);
  const int64_t heads = a.heads / a.groups, row = 2 * heads * whole(a.dim);  // floats of a row and group
  const int64_t wanted = workers > 1 ? 4 * workers : 1;
  const int64_t rows = std::clamp<int64_t>(kStates / row, 1, divided_up(last - first, divided_up(wanted, a.groups)));
  const int64_t ranges = divided_up(last - first, rows), floats = GroupScratch(a, rows * heads, nullptr).floats;
  float* const memory = job_memory.floats(workers * floats);
  std::atomic<int64_t> next{0};
  parallel_for(workers, threads, [&](int64_t worker) {
    for (int64_t i = next++; i < ranges * a.groups; i = next++) {
      const int64_t begin = first + i % ranges * rows;
      kernels.fold_group(a,
                         {i / ranges, begin, std::min(last, begin + rows), work.many.data(), int64_t(work.many.size()),
                          work.unfinished.get(), states},
                         memory + worker * floats);
    }
  });
}

// Partials of as many items as fit are computed by all threads, then folded in order.
void fold_few(const ChunkAttentionArguments& a, const Work& work, const ChunkAttentionState& states, int64_t workers,
              int threads, const ChunkAttentionKernels& kernels) {
  const auto floats_of = [&](const Item& item) { return state_floats(a, (item.last_row - item.first_row) * a.heads); };
  const int64_t count = int64_t(work.few.size());
  int64_t largest = 0;
  for (const Item& item : work.few) largest = std::max(largest, item.last_row - item.first_row);
  const int64_t room = std::max(workers > 1 ? kPartials * workers : 0, state_floats(a, largest * a.heads));
  const int64_t scratch = largest * (a.heads / a.groups) * (whole(a.dim) + whole(a.size));
  float* const partials = partial_memory.floats(room + workers * scratch);
  std::vector<float*> place(size_t(count), nullptr);
  for (int64_t first = 0, last = 0; first < count; first = last) {
    int64_t used = 0;
    for (; last < count && used + floats_of(work.few[size_t(last)]) <= room; ++last) {
      place[size_t(last)] = partials + used;
      used += floats_of(work.few[size_t(last)]);
    }
    const int64_t run = divided_up(last - first, 8 * workers);  // neighbours, so that the next one can be asked for
    std::atomic<int64_t> next{first};
    parallel_for(workers, threads, [&](int64_t worker) {
      for (int64_t begin = next.fetch_add(run); begin < last; begin = next.fetch_add(run))
        for (int64_t i = begin; i < std::min(last, begin + run); ++i) {
          const Item &item = work.few[size_t(i)], &following = work.few[size_t(std::min(i + 1, count - 1))];
          kernels.partial(a, item, following, state_at((item.last_row - item.first_row) * a.heads, place[size_t(i)]),
                          partials + room + worker * scratch);
        }
    });
    parallel_runs(Runs(a.rows, 4 * used / a.rows, threads), threads, [&](int64_t, int64_t from, int64_t to) {
      for (int64_t i = first; i < last; ++i) {
        const Item& item = work.few[size_t(i)];
        const int64_t begin = std::max(from, item.first_row), end = std::min(to, item.last_row);
        if (begin >= end) continue;
        const int64_t before = (begin - item.first_row) * a.heads, at = begin * a.heads;
        const ChunkAttentionState all = state_at((item.last_row - item.first_row) * a.heads, place[size_t(i)]);
        kernels.fold(a, {all.max + before, all.sum + before, all.values + before * whole(a.dim)},
                     (end - begin) * a.heads, {states.max + at, states.sum + at, states.values + at * whole(a.dim)});
      }
    });
  }
  for (int64_t row = 0; row < a.rows; ++row)
    if (work.unfinished[size_t(row)]) kernels.finish(a, states, row);
}

// What one thread takes, about: 150 FLOPs or 40 bytes of pages in a nanosecond, whichever is longer.
double microseconds(const ChunkAttentionArguments& a) {
  int64_t keys = 0, slots = 0;
  for (int64_t row = 0; row < a.rows; ++row) keys += a.positions[row] + 1;
  for (const int64_t* item = a.items; item < a.items + 4 * a.item_count; item += 4)
    slots += std::min(a.size, a.positions[item[3] - 1] + 1 - item[1] * a.size);
  const double flops = 4.0 * double(keys) * double(a.dim * a.heads);
  const double bytes = 2.0 * double(slots) * double(a.dim * a.groups) * (a.bf16 ? 2 : 4);
  return std::max(flops / 150e3, bytes / 40e3);
}

}  // namespace

void chunk_attention(const ChunkAttentionArguments& a, int threads, ChunkAttentionRun run) {
  if (a.rows == 0) return;
  const auto workers = int64_t(std::clamp<double>(microseconds(a) / worth_sharing(), 1, threads));
  const Work work(a);
  const ChunkAttentionKernels kernels = run(a.bf16);
  if (work.few.empty()) return fold_many(a, work, {}, workers, threads, kernels);
  const int64_t queries = a.rows * a.heads;
  const ChunkAttentionState states = state_at(queries, state_memory.floats(state_floats(a, queries)));
  std::fill(states.max, states.max + queries, -INFINITY);
  std::fill(states.sum, states.sum + queries, 0.0f);
  std::fill(states.values, states.values + queries * whole(a.dim), 0.0f);
  if (!work.many.empty()) fold_many(a, work, states, workers, threads, kernels);
  fold_few(a, work, states, workers, threads, kernels);
}

}  // namespace selfreward
