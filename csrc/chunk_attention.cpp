// A row folds the chunks (pages) of its context in ascending order; kernels/chunk_attention.py has the formulas.
//
// Order of the arithmetic, the contract of this file. q is scaled first: q' = q * (1 / sqrt(D)).
//   score of a slot     one ascending FMA chain over D from zero; lanes run over slots, as a page holds keys [D, B]
//   maximum, sum        of a chunk's visible slots: lane l of 16 takes slots l, l + 16, ..., then the tree of math.h
//   weighted values     per element of D one ascending FMA chain over the visible slots, from zero; lanes run over D
//   fold                m' = max(m, p.m), a = e^(m - m'), b = e^(p.m - m'), l' = fma(a, l, b * p.l), o' likewise,
//                       from m = -inf, l = o = 0; out = o / l
// A chunk whose scores are all -inf (keys that overflow) weighs nothing. Nothing of this depends on other rows, other
// heads, threads or the tile in registers.
//
// Slots that a row does not see and pages that it does not need are not read: whatever they hold, NaN too, does not
// reach the result, so fresh pages need no clearing (the torch reference needs their values to be finite).
//
// Loop order: groups, then rows, so that neighbouring rows of one sequence find the group's chunks in the second-level
// cache; then chunks; a chunk's keys and values are read once for all query heads of the group (in tiles of 4).

#include "chunk_attention.h"

#include <algorithm>
#include <vector>

#include "runs.h"

namespace selfreward {
namespace {

constexpr int64_t kAlign = 16;  // floats in a cache line

// `count` rounded up to whole vectors of 16.
inline int64_t whole(int64_t count) { return (count + 15) / 16 * 16; }

// What one item needs, per query head of its group: rows padded to whole vectors.
struct Scratch {
  int64_t width, slots;                 // whole(dim), whole(size)
  float *q, *scores, *partial, *state;  // q scaled, partial and state [heads, width]; scores [heads, slots]
  float *partial_max, *partial_sum, *state_max, *state_sum;  // [heads]

  static int64_t floats(const ChunkAttentionArguments& a) {
    return whole(a.heads / a.groups * (3 * whole(a.dim) + whole(a.size) + 4));
  }

  Scratch(const ChunkAttentionArguments& a, float* memory) : width(whole(a.dim)), slots(whole(a.size)) {
    const int64_t heads = a.heads / a.groups;
    q = memory;
    partial = q + heads * width;
    state = partial + heads * width;
    scores = state + heads * width;
    partial_max = scores + heads * slots;
    partial_sum = partial_max + heads;
    state_max = partial_sum + heads;
    state_sum = state_max + heads;
  }
};

}  // namespace
}  // namespace selfreward

#define SELFREWARD_BODY "chunk_attention_rows.h"
#include "levels.h"

namespace selfreward {

Level<ChunkAttentionItems> chunk_attention_level(int index) { return level_at(index); }

void chunk_attention(const ChunkAttentionArguments& a, int threads, ChunkAttentionItems items) {
  int64_t keys = 0;
  for (int64_t row = 0; row < a.rows; ++row) keys += a.positions[row] + 1;
  const int64_t cost = a.rows ? 2 * keys / a.rows * a.dim * (a.heads / a.groups) : 0;  // of an item on average
  const Runs runs(a.rows * a.groups, cost, threads);
  const int64_t floats = Scratch::floats(a);
  std::vector<float> memory(size_t(runs.count * floats + kAlign));
  float* scratch = memory.data() + kAlign - (reinterpret_cast<uintptr_t>(memory.data()) / sizeof(float)) % kAlign;
  parallel_runs(runs, threads,
                [&](int64_t run, int64_t first, int64_t last) { items(a, first, last, scratch + run * floats); });
}

}  // namespace selfreward
