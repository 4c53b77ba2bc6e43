// The trainer's attention over packed token trees, forward and backward: query i sees key j iff j <= i < end[j], as
// kernels/tree_attention.py has it.
#pragma once

#include <cstdint>

#include "level.h"

namespace selfreward {

struct TreeAttentionArguments {
  const float *q, *k, *v;                // [tokens, heads, dim], [tokens, groups, dim] twice
  int64_t q_stride, k_stride, v_stride;  // floats from a token to the next
  const int64_t* end;                    // [tokens]
  const int64_t* bounds;                 // [windows + 1], ascending from 0 to tokens: no query sees beyond its window
  float *out, *lse;                      // [tokens, heads, dim], [heads, tokens]; read if there are gradients
  const float* dout;                     // [tokens, heads, dim], or null: out and lse are asked for, not gradients
  float *dq, *dk, *dv;                   // [tokens, heads, dim], [tokens, groups, dim] twice
  int64_t windows, tokens, heads, groups, dim;
};

constexpr int64_t kTreeTile = 64;  // tokens of a tile of queries or of keys

// Computes a group's heads in a window; memory: tree_attention_floats.
using TreeAttentionTask = void (*)(const TreeAttentionArguments& a, int64_t group, int64_t window, float* memory);

// The `index`-th level that this CPU can run, fastest first; the last one is "portable", past it the name is empty.
Level<TreeAttentionTask> tree_attention_level(int index);

void tree_attention(const TreeAttentionArguments& a, int threads, TreeAttentionTask task);

}  // namespace selfreward
