// lse = m + log(sum of exp(x - m)) with the row's maximum m, and logp = x[target] - lse; or, where gradients are given,
// x becomes exp(x - lse) (dlse - dlogp), and dlogp is added at the target.
//
// A row is read twice, the second time from the second-level cache (128 KB of 32,000 logits). Order of the sum: blocks
// of 1,024 logits, in each four chains of vectors and the fixed tree of math.h; blocks are added ascending in fp64,
// whose logarithm is rounded once. An infinite maximum is not subtracted, so that infinities come out as torch's do.

#include "logprob.h"

#include <cmath>

#include "runs.h"

#define SELFREWARD_BODY "logprob_rows.h"
#include "levels.h"

namespace selfreward {

Level<LogprobRows> logprob_level(int index) { return level_at(index); }

void logprob(const LogprobArguments& a, int threads, LogprobRows rows) {
  parallel_runs(Runs(a.rows, 8 * a.vocab, threads), threads,
                [&](int64_t, int64_t first, int64_t last) { rows(a, first, last); });
}

}  // namespace selfreward
