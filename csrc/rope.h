// RoPE of fp32 rows, as kernels/rope.py has it, and its gradient, the turn back.
#pragma once

#include <cstdint>

#include "level.h"

namespace selfreward {

struct RopeArguments {
  const float* x;          // [rows, heads, dim]
  int64_t stride;          // floats from a row of x to the next
  const float *cos, *sin;  // [rows, dim / 2]
  float* out;              // [rows, heads, dim]
  int64_t rows, heads, dim;
  bool back;
};

// Turns the rows [first, last).
using RopeRows = void (*)(const RopeArguments& a, int64_t first, int64_t last);

// The `index`-th level that this CPU can run, fastest first; the last one is "portable", past it the name is empty.
Level<RopeRows> rope_level(int index);

void rope(const RopeArguments& a, int threads, RopeRows rows);

}  // namespace selfreward
