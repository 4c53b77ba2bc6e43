// Rows shared out to threads in runs of neighbours.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "threads.h"

namespace selfreward {

// [0, rows) in `count` runs of `length`. `cost`: what a row takes, in multiply-adds; a run is worth at least 2^22 of
// them (some 100 microseconds; what only moves memory gains less by a thread than it costs), and a thread gets up to
// four runs.
struct Runs {
  int64_t rows, length, count;
  Runs(int64_t rows, int64_t cost, int threads) : rows(rows) {
    const int64_t least = share_little() ? 1 : 1 + (int64_t{1} << 22) / std::max<int64_t>(cost, 1);
    length = std::max(least, 1 + (rows - 1) / (int64_t{4} * threads));
    count = rows > 0 ? 1 + (rows - 1) / length : 0;
  }
};

// Calls work(run, first, last) for every run. `work` must not throw.
inline void parallel_runs(const Runs& runs, int threads,
                          const std::function<void(int64_t run, int64_t first, int64_t last)>& work) {
  parallel_for(runs.count, threads,
               [&](int64_t i) { work(i, i * runs.length, std::min(runs.rows, (i + 1) * runs.length)); });
}

}  // namespace selfreward
