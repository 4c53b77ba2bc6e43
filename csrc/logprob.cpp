// A tile of m columns adds to a row's sum s = sum of exp(x - m), m its largest logit, what its own sum is when both are
// brought to the larger of their two maxima; or, where gradients are given, its x becomes exp(x - lse) (dlse - dlogp),
// and dlogp is added at the target.
//
// A row is read twice, the second time from the first-level cache (8 KB of 2,048 logits). Order of a tile's sum: blocks
// of 1,024 logits, in each four chains of vectors and the fixed tree of math.h; blocks and tiles are added in fp64, so
// the tiles' width is part of the numbers, in the last place of few of them. An infinite maximum is not subtracted, so
// that infinities come out as torch's do.

#include "logprob.h"

#include <cmath>

#include "runs.h"

#define SELFREWARD_BODY "logprob_rows.h"
#include "levels.h"

namespace selfreward {

Level<LogprobRows> logprob_level(int index) { return level_at(index); }

void logprob(const LogprobArguments& a, int threads, LogprobRows rows) {
  parallel_runs(Runs(a.rows, 8 * a.columns, threads), threads,
                [&](int64_t, int64_t first, int64_t last) { rows(a, first, last); });
}

}  // namespace selfreward
