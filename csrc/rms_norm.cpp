// RMSNorm: out = weight * (x / sqrt(mean(x^2) + eps)), one rounding after every step, sqrt and division by IEEE.
//
// Order of the sum of squares: lane l of 16 takes features l, l + 16, ... in ascending order, one FMA chain from zero;
// the lanes are added in a fixed tree (math.h). Loop order: a row twice (the second time from the first-level cache),
// rows shared out to threads in runs. A row's bits depend on nothing but the row.
//
// Measured, dim 768, one thread of an AMD EPYC (family 26, AVX-512), microseconds with the call from Python:
//   rows        1      8     64    256
//   torch      10   11.1   21.1   59.1
//   native    4.7    5.6   10.8   28.4

#include "rms_norm.h"

#include "runs.h"

#define SELFREWARD_BODY "rms_norm_rows.h"
#include "levels.h"

namespace selfreward {

Level<RmsNormRows> rms_norm_level(int index) { return level_at(index); }

void rms_norm(const RmsNormArguments& a, int threads, RmsNormRows rows) {
  parallel_runs(Runs(a.rows, 4 * a.dim, threads), threads,
                [&](int64_t, int64_t first, int64_t last) { rows(a, first, last); });
}

}  // namespace selfreward
