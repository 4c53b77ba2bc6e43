// A token drawn per row of logits, as kernels/sample.py has it.
#pragma once

#include <cstdint>

#include "level.h"

namespace selfreward {

struct SampleArguments {
  const float* logits;  // [rows, width]
  // A value per row; what they mean is said in kernels/sample.py.
  const float* temperature;
  const int64_t* top_k;
  const double *top_p, *min_p;
  const int64_t *seeds, *positions, *candidates;
  // Row r's ids are those from offsets[r] up to offsets[r + 1].
  const int64_t *forbidden_offsets, *forbidden, *label_offsets, *label_ids;
  int64_t* ids;          // [rows]
  float *raw, *sampled;  // [rows]
  float* labels;         // one per label id
  int64_t rows, width, vocab;
};

// What a row needs besides its logits; every array has room for the row, rounded up to 16 values.
struct SampleScratch {
  double* mass;    // e^y in double precision: of the row, or of `ids`
  float* allowed;  // the logits, -inf where forbidden
  float* weight;   // e^y, -1 where the token is cut off
  int32_t *ids, *order;
};

// Draws for the rows [first, last).
using SampleRows = void (*)(const SampleArguments& a, const SampleScratch& scratch, int64_t first, int64_t last);

// The `index`-th level that this CPU can run, fastest first; the last one is "portable", past it the name is empty.
Level<SampleRows> sample_level(int index);

void sample(const SampleArguments& a, int threads, SampleRows rows);

}  // namespace selfreward
