// The gradient of RMSNorm, alone or behind the addition of a residual stream: kernels/rms_norm.py has the formulas.
#pragma once

#include <cstdint>

#include "level.h"

namespace selfreward {

constexpr int64_t kNormBlock = 64;  // rows whose part of the weight's gradient is one sum

struct RmsNormGradientArguments {
  const float *x, *weight, *dy;  // [rows, dim], [dim], [rows, dim]; x: what was normed, with the branch in it
  const float* dsum;             // [rows, dim], the gradient that x has by another way, which is added; or null
  float* dx;                     // [rows, dim]
  float* parts;                  // [blocks of kNormBlock rows, dim]: sums for dweight
  int64_t rows, dim;
  float eps;
};

// Computes the blocks [first, last).
using RmsNormGradientBlocks = void (*)(const RmsNormGradientArguments& a, int64_t first, int64_t last);

// The `index`-th level that this CPU can run, fastest first; the last one is "portable", past it the name is empty.
Level<RmsNormGradientBlocks> rms_norm_gradient_level(int index);

// dweight [dim]: the parts, added in ascending order.
void rms_norm_gradient(const RmsNormGradientArguments& a, float* dweight, int threads, RmsNormGradientBlocks blocks);

}  // namespace selfreward
