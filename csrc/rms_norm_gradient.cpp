// With r = 1 / sqrt(mean(x^2) + eps), made again from x: dx = r (weight dy - x r^2 mean(weight dy x)) + dsum and
// dweight = sum over rows of dy x r.
//
// Order: lane l of 16 takes features l, l + 16, ... in two FMA chains from zero, added in the fixed tree of math.h. The
// weight's gradient is summed over 64 rows at a time, ascending, and these sums in ascending order, so that threads,
// which take whole blocks, change no bit.

#include "rms_norm_gradient.h"

#include <algorithm>

#include "runs.h"

#define SELFREWARD_BODY "rms_norm_gradient_blocks.h"
#include "levels.h"

namespace selfreward {

Level<RmsNormGradientBlocks> rms_norm_gradient_level(int index) { return level_at(index); }

void rms_norm_gradient(const RmsNormGradientArguments& a, float* dweight, int threads, RmsNormGradientBlocks blocks) {
  const int64_t count = (a.rows + kNormBlock - 1) / kNormBlock;
  parallel_runs(Runs(count, 8 * kNormBlock * a.dim, threads), threads,
                [&](int64_t, int64_t first, int64_t last) { blocks(a, first, last); });
  std::fill(dweight, dweight + a.dim, 0.0f);
  for (int64_t block = 0; block < count; ++block)
    for (int64_t i = 0; i < a.dim; ++i) dweight[i] += a.parts[block * a.dim + i];
}

}  // namespace selfreward
