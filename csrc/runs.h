// Rows shared out to threads in runs of neighbours.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "threads.h"

namespace selfreward {

// [0, rows) in `count` runs of `length`, up to four for each thread. `cost`: what a row takes, in multiply-adds, 42 of
// them a nanosecond. What only moves memory gains less by another thread than a product does: it is shared from 2.5
// times as much work on.
struct Runs {
  int64_t rows, length, count;
  Runs(int64_t rows, int64_t cost, int threads) : rows(rows) {
    const double shares = double(rows) * double(cost) / 42e3 / (2.5 * worth_sharing());
    const int64_t wanted = shares < 1 ? 1 : int64_t(std::min(2 * shares, 4.0 * threads));
    length = 1 + (rows - 1) / wanted;
    count = rows > 0 ? 1 + (rows - 1) / length : 0;
  }
};

// Calls work(run, first, last) for every run.
inline void parallel_runs(const Runs& runs, int threads,
                          const std::function<void(int64_t run, int64_t first, int64_t last)>& work) {
  parallel_for(runs.count, threads,
               [&](int64_t i) { work(i, i * runs.length, std::min(runs.rows, (i + 1) * runs.length)); });
}

}  // namespace selfreward
