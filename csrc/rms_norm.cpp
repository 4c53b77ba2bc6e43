// RMSNorm: out = weight * (x / sqrt(mean(x^2) + eps)), one rounding after every step, sqrt and division by IEEE.
//
// Order of the sum of squares: lane l of 16 takes features l, l + 16, ... in ascending order, one FMA chain from zero;
// the lanes are added in a fixed tree (math.h). A sum with a branch is rounded once, stored, and normed as any row is.
// Loop order: four rows side by side, each twice (the second time from the first-level cache, or the second for wide
// rows), rows shared out to threads in runs. A row's bits depend on nothing but the row.
//
// Measured on one thread of an AMD EPYC (family 26, AVX-512), microseconds with the call from Python, everything in the
// caches; "one by one": one row at a time; copy: numpy's, the same bytes as rms_norm without its weight; embed: our own
// copy by vectors.
//   rows x dim          1 x 768   8 x 768   32 x 768   512 x 768   32 x 4,096   128 x 4,096
//   one by one              0.5       1.1        3.5          51         17.0            61
//   rms_norm                0.6       0.9        2.1          38         13.1            54
//   with a branch           0.9       1.4        3.7          74         27              92
//   copy                    0.4       0.6        1.3          30          7.5            34
//   embed                   0.6       0.8        1.8          31         10.2            42
// Rejected: scaling four rows while the squares of the next four are summed (0 to 10% slower).

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
