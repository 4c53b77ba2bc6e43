// Sections of x are prepared in memory that the calling thread keeps, so that no call waits for pages from the system.

#include "linear_prepared.h"

#include <algorithm>

#include "linear_sizes.h"
#include "scratch.h"
#include "threads.h"

namespace selfreward {
namespace {

constexpr int64_t kSection = 4 * kRows;  // 88 MB at most for a depth of 11,008 in bf16 without dot instructions

thread_local Scratch scratch;

int64_t whole_lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

}  // namespace

void linear_prepared(const float* x, int64_t depth, int64_t groups, const LinearArguments& a, int threads,
                     const LinearKernel& kernel) {
  for (int64_t start = 0; start < a.rows; start += kSection) {
    LinearArguments section = a;
    section.rows = std::min(kSection, a.rows - start);
    section.out = a.out + start * a.outputs;
    const int64_t values = whole_lines(section.rows * a.units * kernel.parts * kPiece);
    const int64_t scales = whole_lines(section.rows * groups * 4);
    char* memory = scratch.get(values + 2 * scales);
    const LinearPrepare prepare{x + start * depth,
                                depth,
                                a.units,
                                groups,
                                reinterpret_cast<uint32_t*>(memory),
                                reinterpret_cast<float*>(memory + values),
                                reinterpret_cast<int32_t*>(memory + values + scales)};
    section.x = prepare.to;
    section.x_scales = prepare.scales;
    section.starts = prepare.starts;
    // About 5 values a nanosecond.
    const bool share = double(section.rows * depth) / 5e3 > worth_sharing();
    const int64_t pieces = share ? std::min<int64_t>(section.rows, 4 * threads) : 1;
    parallel_for(pieces, threads, [&](int64_t i) {
      kernel.prepare(prepare, section.rows * i / pieces, section.rows * (i + 1) / pieces);
    });
    linear(section, threads, kernel.panels, kernel.rate);
  }
}

}  // namespace selfreward
