// Gumbel noise of one row, at each instruction level that this binary holds. All levels give the same bits.
#pragma once

#include <cstdint>

namespace selfreward {

// Fills out[v] for v in [0, vocab) from Philox with key `seed` and counter (position, candidate, v / 4, stream);
// token v takes word v % 4.
using GumbelRow = void (*)(uint64_t seed, uint32_t position, uint32_t candidate, uint32_t stream, int64_t vocab,
                           float* out);

struct GumbelLevel {
  const char* name;
  GumbelRow row;
};

// The `index`-th level that this CPU can run, fastest first; the last one is "portable", past it the row is null.
GumbelLevel gumbel_level(int index);

}  // namespace selfreward
