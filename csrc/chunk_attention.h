// Attention of fp32 rows over paged keys and values, as kernels/chunk_attention.py has it.
#pragma once

#include <cstdint>

#include "level.h"

namespace selfreward {

struct ChunkAttentionArguments {
  const float* q;            // [rows, heads, dim]
  const float* key_pages;    // [blocks, groups, dim, size]
  const float* value_pages;  // [blocks, groups, size, dim]
  const int64_t* tables;     // [rows, chunks]
  const int64_t* positions;  // [rows], below chunks * size
  float* out;                // [rows, heads, dim]
  int64_t rows, heads, groups, dim, size, chunks;
};

// Computes the items [first, last): item i is row i % rows with the query heads of group i / rows. scratch: see below.
using ChunkAttentionItems = void (*)(const ChunkAttentionArguments& a, int64_t first, int64_t last, float* scratch);

// The `index`-th level that this CPU can run, fastest first; the last one is "portable", past it the name is empty.
Level<ChunkAttentionItems> chunk_attention_level(int index);

// Slots of a page that a row does not see, and pages that no row needs, are never read: they may hold anything.
void chunk_attention(const ChunkAttentionArguments& a, int threads, ChunkAttentionItems items);

}  // namespace selfreward
