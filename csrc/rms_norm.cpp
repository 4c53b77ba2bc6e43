// RMSNorm: out = weight * (x / sqrt(mean(x^2) + eps)), one rounding after every step, sqrt and division by IEEE.
//
// Order of the sum of squares: lane l of 16 takes features l, l + 16, ... in ascending order, one FMA chain from zero;
// the lanes are added in a fixed tree (math.h). Loop order: a row twice (the second time from the first-level cache),
// rows shared out to threads in runs. A row's bits depend on nothing but the row.

#include "rms_norm.h"

#include "runs.h"

#define SELFREWARD_BODY "rms_norm_rows.h"
#include "levels.h"

namespace selfreward {

Level<RmsNormRows> rms_norm_level(int index) { return level_at(index); }

void rms_norm(const RmsNormArguments& a, int threads, RmsNormRows rows) {
  parallel_runs(Runs(a.rows, a.dim, threads), threads,
                [&](int64_t, int64_t first, int64_t last) { rows(a, first, last); });
}

}  // namespace selfreward
