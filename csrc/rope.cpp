// Products and sums are rounded one by one, as in rope_write.cpp: the trainer's keys and the sampler's have the same
// bits.

#include "rope.h"

#include "runs.h"

#define SELFREWARD_BODY "rope_rows.h"
#include "levels.h"

namespace selfreward {

Level<RopeRows> rope_level(int index) { return level_at(index); }

void rope(const RopeArguments& a, int threads, RopeRows rows) {
  parallel_runs(Runs(a.rows, 4 * a.heads * a.dim, threads), threads,
                [&](int64_t, int64_t first, int64_t last) { rows(a, first, last); });
}

}  // namespace selfreward
