// SwiGLU of fp32 rows, as kernels/swiglu.py has it.
#pragma once

#include <cstdint>

#include "level.h"

namespace selfreward {

struct SwigluArguments {
  const float* gate_up;  // [rows, 2 * ffn], gate first
  float* out;            // [rows, ffn]
  int64_t rows, ffn;
};

// Computes the rows [first, last).
using SwigluRows = void (*)(const SwigluArguments& a, int64_t first, int64_t last);

// The `index`-th level that this CPU can run, fastest first; the last one is "portable", past it the name is empty.
Level<SwigluRows> swiglu_level(int index);

void swiglu(const SwigluArguments& a, int threads, SwigluRows rows);

}  // namespace selfreward
