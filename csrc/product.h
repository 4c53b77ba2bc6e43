// The trainer's products of fp32 matrices: a linear forward, and both of its gradients.
#pragma once

#include <cstdint>

#include "level.h"

namespace selfreward {

// Element (i, j) is data[i * stride + j], or data[j * stride + i] of a transposed one.
struct Matrix {
  const float* data;
  int64_t stride;
  bool transposed;
};

// What a level computes: a block of rows times packed panels of 64 columns.
struct ProductBlock {
  const float*
      a;  // [rows, depth], rows `stride` apart; or packed: [groups of kProductGroup rows, depth, kProductGroup]
  int64_t stride;
  bool packed;
  const float* b;  // [ceil(columns / 64), depth, 64]
  float* out;      // [rows, columns], rows `out_stride` apart
  int64_t out_stride, rows, columns, depth;
  bool add;  // to what is in out
};

constexpr int64_t kProductGroup = 6;                     // rows that are in registers at a time
constexpr int64_t kProductSection = 42 * kProductGroup;  // rows whose sums wait in a buffer (64 KB)

// Computes the `section`-th section of rows of the panels [first, last).
using ProductRun = void (*)(const ProductBlock& block, int64_t section, int64_t first, int64_t last);

// The `index`-th level that this CPU can run, fastest first; the last one is "portable", past it the name is empty.
Level<ProductRun> product_level(int index);

// out [rows, columns] = a [rows, depth] times b [depth, columns], or that much more where `add`. The order of the sums
// is that of kernels/linear.py, from what is in out if that is added to, whatever the rest is.
void product(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, int64_t rows, int64_t columns,
             int64_t depth, bool add, int threads, ProductRun run);

}  // namespace selfreward
