// RoPE of fp32 queries and keys, and the write of keys and values to their pages, as kernels/rope_write.py has it.
#pragma once

#include <cstdint>

#include "level.h"

namespace selfreward {

struct RopeWriteArguments {
  const float *q, *k, *v;                // [rows, heads, dim], [rows, groups, dim] twice
  int64_t q_stride, k_stride, v_stride;  // floats from a row to the next
  const float *cos, *sin;                // [rows, dim / 2]
  void* key_pages;                       // [blocks, groups, dim, size], float or uint16_t, the bits of a bf16
  void* value_pages;                     // [blocks, groups, size, dim], likewise
  bool bf16;
  const int64_t* slots;   // [rows], block * size + slot
  const int64_t* copies;  // [copy_count, 3]: source block, target block, tokens
  float* out;             // [rows, heads, dim]: q, turned
  int64_t rows, heads, groups, dim, size, copy_count;
};

// Turns and writes the rows [first, last).
using RopeWriteRows = void (*)(const RopeWriteArguments& a, int64_t first, int64_t last);

// The `index`-th level that this CPU can run, fastest first; the last one is "portable", past it the name is empty.
Level<RopeWriteRows> rope_write_level(int index);

void rope_write(const RopeWriteArguments& a, int threads, RopeWriteRows rows);

}  // namespace selfreward
