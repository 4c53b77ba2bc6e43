// FlashAttention 2's schedule in tiles of 64 queries and 64 keys, each product a small one in registers with vector
// lanes over keys (scores) or features (the rest). A tile of keys that no query of a tile sees is skipped; one that all
// of them see whole needs no mask. Nothing but out and the log of each softmax's sum is kept for the backward, which
// makes the scores again.
//
// A job is a group's heads in a window, the tokens between two places that nobody sees across (a tree). Its keys and
// values are laid out for the products once. The gradient is computed in one pass over pairs of tiles, queries outside:
// dq of a tile stays in place while dk and dv, of all the window's keys, are added to, in a fixed order. Only whole
// jobs are shared out, so threads change no bit, and neither does what else is in the pack.

#include "tree_attention.h"

#include <algorithm>
#include <atomic>

#include "scratch.h"
#include "threads.h"

#define SELFREWARD_BODY "tree_attention_task.h"
#include "levels.h"

namespace selfreward {
namespace {

// Tiles of 64 x 64 that a job keeps: for each 64 tokens keys, values and their like, and some for the tile at hand.
int64_t floats_of(const TreeAttentionArguments& a, int64_t tokens) {
  const int64_t blocks = (tokens + kTreeTile - 1) / kTreeTile, panels = (a.dim + kTreeTile - 1) / kTreeTile;
  return ((a.dout ? 5 : 2) * blocks * panels + 4 * panels + 2) * kTreeTile * kTreeTile + 8 * kTreeTile;
}

}  // namespace

Level<TreeAttentionTask> tree_attention_level(int index) { return level_at(index); }

void tree_attention(const TreeAttentionArguments& a, int threads, TreeAttentionTask task) {
  double pairs = 0.0;
  int64_t longest = 0;
  for (int64_t i = 0; i < a.windows; ++i) {
    const int64_t tokens = a.bounds[i + 1] - a.bounds[i];
    pairs += double(tokens) * double(tokens);
    longest = std::max(longest, tokens);
  }
  if (pairs * double(a.heads * a.dim) / 130e3 < worth_sharing()) threads = 1;
  // All workers' memory is the caller's: where there is none, that is known before any of them begins.
  thread_local Scratch scratch;
  const int64_t jobs = a.groups * a.windows, floats = floats_of(a, longest);
  const int64_t workers = std::min<int64_t>(threads, jobs);
  float* const memory = scratch.floats(workers * floats);
  std::atomic<int64_t> next{0};
  parallel_for(workers, threads, [&](int64_t worker) {
    for (int64_t i = next++; i < jobs; i = next++) task(a, i % a.groups, i / a.groups, memory + worker * floats);
  });
}

}  // namespace selfreward
