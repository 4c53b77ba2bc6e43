// Log-probs of rows of logits, and the gradient of the logits, as kernels/linear_logprob.py has them.
#pragma once

#include <cstdint>

#include "level.h"

namespace selfreward {

struct LogprobArguments {
  float* logits;                      // [rows, vocab]; the gradient takes their place
  int64_t stride;                     // floats from a row to the next
  const int64_t* targets;             // [rows], 0 or more and below vocab
  float *logp, *lse;                  // [rows]; with gradients lse is read
  const float *grad_logp, *grad_lse;  // [rows], or null: log-probs are asked for, not gradients
  int64_t rows, vocab;
};

// Computes the rows [first, last).
using LogprobRows = void (*)(const LogprobArguments& a, int64_t first, int64_t last);

// The `index`-th level that this CPU can run, fastest first; the last one is "portable", past it the name is empty.
Level<LogprobRows> logprob_level(int index);

void logprob(const LogprobArguments& a, int threads, LogprobRows rows);

}  // namespace selfreward
