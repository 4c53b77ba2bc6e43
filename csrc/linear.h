// The sampler's fp32 linear: y[n, o] = sum over k of x[n, k] * w[o, k], the same bits as kernels/linear.py; and what
// the linears of the other number formats (linear_bf16.h, linear_int8.h) share with it.
#pragma once

#include <cstdint>

#include "level.h"

namespace selfreward {

constexpr int64_t kPanel = 64;  // outputs in one panel of packed weights

// w [outputs, depth] row-major -> the outputs first .. first + outputs of packed [panels, depth, 64]; no other lane is
// touched, and what stands in those behind the last output reaches no result.
void linear_pack(const float* w, int64_t outputs, int64_t depth, int64_t first, float* packed);
void linear_unpack(const float* packed, int64_t outputs, int64_t depth, int64_t first, float* w);

// Packed panels are read in units: the next 4 bytes of each of 64 outputs, which are one fp32, two bf16 or four 8-bit
// weights along the depth.
struct LinearArguments {
  const void* x;       // [rows, units], in the form of the number format and the instruction level
  const void* packed;  // [ceil(outputs / 64), units, 64]
  float* out;          // [rows, outputs]
  int64_t rows, outputs, units;
  // int8: x's scales and the starts of its integer sums, [rows, groups]; the weights' scales, [outputs]
  const float* x_scales = nullptr;
  const int32_t* starts = nullptr;
  const float* scales = nullptr;
};

// Computes the panels [first, last).
using LinearPanels = void (*)(const LinearArguments& a, int64_t first, int64_t last);

// The `index`-th level that this CPU can run, fastest first; the last one is "portable", past it the name is empty.
Level<LinearPanels> linear_level(int index);

// Any number of rows and threads; both leave a row's bits as they are. rate: units that a thread multiplies and adds in
// a nanosecond, about.
void linear(const LinearArguments& a, int threads, LinearPanels panels, double rate = 130);

}  // namespace selfreward
