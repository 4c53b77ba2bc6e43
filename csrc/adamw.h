// AdamW of bf16 parameters with a stochastically rounded write, as kernels/adamw.py has it.
#pragma once

#include <cstdint>

#include "level.h"

namespace selfreward {

struct AdamWArguments {
  uint16_t* weight;      // bits of bf16, [count], as all are
  const uint16_t* grad;  // the same
  float* mean;
  float* square;
  int64_t count;
  uint64_t key, first;                                              // first: the place of element 0 in its parameter
  uint32_t number;                                                  // of the parameter
  float beta1, rest1, beta2, rest2, eps, decay, rate, root, scale;  // rest: 1 - beta
};

constexpr int64_t kAdamWChunk = 128;  // elements: sixteen counters of Philox, eight elements each

// Computes the chunks [begin, end), counted from the one that element 0 is in; chunks are aligned to the parameter.
using AdamWChunks = void (*)(const AdamWArguments& a, int64_t begin, int64_t end);

// The `index`-th level that this CPU can run, fastest first; the last one is "portable", past it the name is empty.
Level<AdamWChunks> adamw_level(int index);

void adamw(const AdamWArguments& a, int threads, AdamWChunks chunks);

}  // namespace selfreward
