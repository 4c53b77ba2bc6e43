// RMSNorm of fp32 rows, alone or behind the addition that a residual stream makes, as kernels/rms_norm.py has it.
#pragma once

#include <cstdint>

#include "level.h"

namespace selfreward {

struct RmsNormArguments {
  const float* x;       // [rows, dim]
  const float* branch;  // [rows, dim], added to x first; or null
  const float* weight;  // [dim]
  float* sum;           // [rows, dim]: x + branch, if there is a branch
  float* out;           // [rows, dim]
  int64_t rows, dim;
  float eps;
};

// Computes the rows [first, last).
using RmsNormRows = void (*)(const RmsNormArguments& a, int64_t first, int64_t last);

// The `index`-th level that this CPU can run, fastest first; the last one is "portable", past it the name is empty.
Level<RmsNormRows> rms_norm_level(int index);

void rms_norm(const RmsNormArguments& a, int threads, RmsNormRows rows);

}  // namespace selfreward
