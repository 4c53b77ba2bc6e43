// Linears that bring x into another form first: bf16 and int8.
#pragma once

#include <cstdint>

#include "linear.h"

namespace selfreward {

// Rows of x in the form that a level's panels take.
struct LinearPrepare {
  const float* x;  // [rows, depth]
  int64_t depth, units, groups;
  uint32_t* to;     // [rows, units, LinearKernel::parts]
  float* scales;    // [rows, groups], as LinearArguments::x_scales
  int32_t* starts;  // [rows, groups]
};

struct LinearKernel {
  void (*prepare)(const LinearPrepare& p, int64_t first, int64_t last);  // the rows [first, last)
  LinearPanels panels;
  int parts;
  double rate;  // as in linear()
};

// a.x is not used. groups: of x's scales, 0 for bf16.
void linear_prepared(const float* x, int64_t depth, int64_t groups, const LinearArguments& a, int threads,
                     const LinearKernel& kernel);

}  // namespace selfreward
