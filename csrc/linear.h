// The sampler's fp32 linear: y[n, o] = sum over k of x[n, k] * w[o, k], the same bits as kernels/linear.py.
#pragma once

#include <cstdint>

namespace selfreward {

constexpr int64_t kPanel = 64;  // outputs in one panel of packed weights

// w [outputs, depth] row-major -> packed [ceil(outputs / 64), depth, 64], the last panel padded with zeros.
void linear_pack(const float* w, int64_t outputs, int64_t depth, float* packed);

struct LinearArguments {
  const float* x;       // [rows, depth]
  const float* packed;  // [ceil(outputs / 64), depth, 64]
  float* out;           // [rows, outputs]
  int64_t rows, outputs, depth;
};

// Computes the panels [first, last).
using LinearPanels = void (*)(const LinearArguments& a, int64_t first, int64_t last);

struct LinearLevel {
  const char* name;
  LinearPanels run;
};

// The `index`-th level that this CPU can run, fastest first; the last one is "portable", past it `run` is null.
LinearLevel linear_level(int index);

// Any number of rows and threads; both leave a row's bits as they are.
void linear(const LinearArguments& a, int threads, LinearPanels panels);

}  // namespace selfreward
