// Attention of fp32 rows over paged keys and values, as kernels/chunk_attention.py has it.
#pragma once

#include <cstdint>

#include "level.h"

namespace selfreward {

struct ChunkAttentionArguments {
  const float* q;            // [rows, heads, dim]
  const float* key_pages;    // [blocks, groups, dim, size]
  const float* value_pages;  // [blocks, groups, size, dim]
  const int64_t* items;      // [item_count, 4]: page, chunk, first row, last row (exclusive); a row's chunks ascend
  const int64_t* positions;  // [rows]
  float* out;                // [rows, heads, dim]
  int64_t rows, heads, groups, dim, size, item_count;
};

// What one thread computes by itself: some rows for the query heads of some groups.
struct ChunkAttentionJob {
  int64_t first_group, last_group, first_row, last_row;  // last: exclusive
};
using ChunkAttentionRun = void (*)(const ChunkAttentionArguments& a, const ChunkAttentionJob& job, float* scratch);

// The `index`-th level that this CPU can run, fastest first; the last one is "portable", past it the name is empty.
Level<ChunkAttentionRun> chunk_attention_level(int index);

// The slots of a page that no row of its item sees, and pages that no item names, are never read: they may hold
// anything.
void chunk_attention(const ChunkAttentionArguments& a, int threads, ChunkAttentionRun run);

}  // namespace selfreward
