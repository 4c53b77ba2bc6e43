// Log-probs from logits that come a tile of columns at a time, and the gradient of a tile, as kernels/linear_logprob.py
// has them.
#pragma once

#include <cstdint>

#include "level.h"

namespace selfreward {

struct LogprobArguments {
  float* logits;           // [rows, columns], of which the first is token `first`; their gradient takes their place
  int64_t stride;          // floats from a row to the next
  const int64_t* targets;  // [rows]; only those that are in the tile count
  int64_t first;
  float* best;                              // [rows]: the largest logit so far, -infinity before the first tile
  double* total;                            // [rows]: the sum so far of exp(logit - best)
  float* hit;                               // [rows]: the target's logit, once it was there
  const float *lse, *grad_logp, *grad_lse;  // [rows]; null: best, total and hit are asked for, not gradients
  int64_t rows, columns;
};

// Computes the rows [first, last).
using LogprobRows = void (*)(const LogprobArguments& a, int64_t first, int64_t last);

// The `index`-th level that this CPU can run, fastest first; the last one is "portable", past it the name is empty.
Level<LogprobRows> logprob_level(int index);

void logprob(const LogprobArguments& a, int threads, LogprobRows rows);

}  // namespace selfreward
