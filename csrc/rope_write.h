// RoPE and the write of keys and values into their pages, in one pass, as kernels/rope_write.py has it.
#pragma once

#include <cstdint>

namespace selfreward {

struct RopeWriteArguments {
  const float *q, *k, *v;  // [rows, heads | groups | groups, dim]; rows lie q_stride, k_stride, v_stride apart
  int64_t q_stride, k_stride, v_stride;
  const float *cos, *sin;          // [rows, dim / 2]
  float *key_pages, *value_pages;  // [blocks, groups, dim, size], [blocks, groups, size, dim]
  const int64_t* slots;            // [rows]: block * size + slot
  const int64_t* copies;           // [copy_count, 3]: source block, target block, slots
  float* out;                      // [rows, heads, dim]: q, turned
  int64_t rows, heads, groups, dim, size, copy_count;
};

// All writes, then the copies in their order: a source may be written by the same call.
void rope_write(const RopeWriteArguments& a, int threads);

}  // namespace selfreward
