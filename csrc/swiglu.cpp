// SwiGLU: out = gate / (1 + exp(-gate)) * up, element by element, exp from math.h; rows shared out to threads in runs.
//
// Measured, ffn 2048, one thread of an AMD EPYC (family 26, AVX-512), microseconds with the call from Python:
//   rows        1      8     64    256
//   torch     3.8    8.3   45.3    166
//   native    3.5    6.6   29.3    107

#include "swiglu.h"

#include "runs.h"

#define SELFREWARD_BODY "swiglu_rows.h"
#include "levels.h"

namespace selfreward {

Level<SwigluRows> swiglu_level(int index) { return level_at(index); }

void swiglu(const SwigluArguments& a, int threads, SwigluRows rows) {
  parallel_runs(Runs(a.rows, 8 * a.ffn, threads), threads,
                [&](int64_t, int64_t first, int64_t last) { rows(a, first, last); });
}

}  // namespace selfreward
