// A row folds the chunks (pages) of its context in ascending order; kernels/chunk_attention.py has the formulas.
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
// heads, threads or the tile in registers.
//
// Slots that a row does not see and pages that it does not need are not read: whatever they hold, NaN too, does not
// reach the result, so fresh pages need no clearing (the torch reference needs their values to be finite).
//
// Loop order: groups, then rows, so that neighbouring rows of one sequence find the group's chunks in the second-level
// cache; then chunks; a chunk's keys and values are read once for all query heads of the group (in tiles of 4).
// Asking for the next chunk's pages in advance was rejected: 1.2 to 1.4 times faster at best, where every row has
// pages of its own (64 rows of 512 tokens), 1.9 times slower where 64 rows share theirs.
//
// Measured on one thread of an AMD EPYC (family 26, AVX-512; microseconds with the call from Python; torch: the
// reference in kernels/chunk_attention.py), 12 heads of 64, pages of 64:
//   rows x context           1 x 64    1 x 512     8 x 64    8 x 512    64 x 64   64 x 512   256 x 64  256 x 512
//   torch, own pages             52        476        164      1,665      2,133     15,751      9,699     82,628
//   own pages                    10         40         42        515        514      8,745      4,012     36,449
//     on two threads             10         39         43        330        282      4,553      1,914     24,431
//   torch, shared pages          52        482        156      1,403      1,284     10,674      7,927     65,003
//   shared pages                 10         40         23        189        128      1,312        482      4,973
//     on two threads             10         39         24        137        112        718        337      2,609
// Own pages of 64 x 512 are 201 MB: memory bounds them.

#include "chunk_attention.h"

#include <algorithm>
#include <vector>

#include "runs.h"

namespace selfreward {
namespace {

constexpr int64_t kChain = 16;  // products in one FMA chain: part of the numbers
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
