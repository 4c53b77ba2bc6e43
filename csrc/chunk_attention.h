// Attention of fp32 rows over paged keys and values, as kernels/chunk_attention.py has it.
#pragma once

#include <cstdint>

#include "level.h"

namespace selfreward {

struct ChunkAttentionArguments {
  const float* q;           // [rows, heads, dim]
  const void* key_pages;    // [blocks, groups, dim, size], float or uint16_t, the bits of a bf16
  const void* value_pages;  // [blocks, groups, size, dim], likewise
  bool bf16;
  const int64_t* items;      // [item_count, 4]: page, chunk, first row, last row (exclusive); a row's chunks ascend
  const int64_t* positions;  // [rows]
  float* out;                // [rows, heads, dim]
  int64_t rows, heads, groups, dim, size, item_count;
};

struct ChunkAttentionItem {
  int64_t page, chunk, first_row, last_row;  // last: exclusive
};

// Maximum, sum and weighted values of some queries: [queries], [queries], [queries, dim in whole vectors].
struct ChunkAttentionState {
  float *max, *sum, *values;
};

// Some rows for the query heads of one group, and the items that they fold.
struct ChunkAttentionJob {
  int64_t group, first_row, last_row;  // last: exclusive
  const ChunkAttentionItem* items;
  int64_t item_count;
  const bool* unfinished;      // [rows]: its state is wanted, not the result
  ChunkAttentionState states;  // of all rows and heads
};

// One instruction level's functions; chunk_attention.cpp says what they are for.
struct ChunkAttentionKernels {
  void (*fold_group)(const ChunkAttentionArguments& a, const ChunkAttentionJob& job, float* scratch);
  void (*partial)(const ChunkAttentionArguments& a, const ChunkAttentionItem& item, const ChunkAttentionItem& next,
                  const ChunkAttentionState& partial, float* scratch);
  void (*fold)(const ChunkAttentionArguments& a, const ChunkAttentionState& partial, int64_t queries,
               const ChunkAttentionState& state);
  void (*finish)(const ChunkAttentionArguments& a, const ChunkAttentionState& states, int64_t row);
};
using ChunkAttentionRun = ChunkAttentionKernels (*)(bool bf16);

// The `index`-th level that this CPU can run, fastest first; the last one is "portable", past it the name is empty.
Level<ChunkAttentionRun> chunk_attention_level(int index);

// The slots of a page that no row of its item sees, and pages that no item names, are never read: they may hold
// anything.
void chunk_attention(const ChunkAttentionArguments& a, int threads, ChunkAttentionRun run);

}  // namespace selfreward
