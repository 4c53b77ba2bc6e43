// The gradient of SwiGLU, as kernels/swiglu.py has it.
#pragma once

#include <cstdint>

#include "level.h"

namespace selfreward {

struct SwigluGradientArguments {
  const float* gate_up;  // [rows, 2 * ffn], gate first
  const float* dout;     // [rows, ffn]
  float* dgate_up;       // [rows, 2 * ffn]
  int64_t rows, ffn;
};

// Computes the rows [first, last).
using SwigluGradientRows = void (*)(const SwigluGradientArguments& a, int64_t first, int64_t last);

// The `index`-th level that this CPU can run, fastest first; the last one is "portable", past it the name is empty.
Level<SwigluGradientRows> swiglu_gradient_level(int index);

void swiglu_gradient(const SwigluGradientArguments& a, int threads, SwigluGradientRows rows);

}  // namespace selfreward
