#include <algorithm>

#include "driver.h"
#include "linear.h"

namespace {

using selfreward::kPanel;

void check_shape(int64_t rows, int64_t outputs, int64_t depth) {
  const int64_t panels = (outputs + kPanel - 1) / kPanel;
  driver::Agreement agreement;
  driver::every_way(selfreward::linear_level, driver::shape_of("rows", rows, "outputs", outputs, "depth", depth),
                    [&](auto run, int threads, int slack) {
                      const driver::Buffer<float> x("x", rows * depth, slack), weight("weight", outputs * depth, slack);
                      const driver::Buffer<float> packed("packed", panels * depth * kPanel, slack);
                      const driver::Buffer<float> out("out", rows * outputs, slack);
                      driver::Random random(3);
                      random.fill(x), random.fill(weight);
                      selfreward::linear_pack(weight, outputs, depth, packed);
                      agreement.check_finite(packed);
                      // What pads the last panel reaches no result.
                      for (int64_t i = (panels - 1) * kPanel * depth; i < packed.size(); ++i)
                        if ((panels - 1) * kPanel + i % kPanel >= outputs) packed[i] = NAN;
                      selfreward::linear({x, packed, out, rows, outputs, depth}, threads, run);
                      agreement.check_finite(out);
                    });
}

void check_linear() {
  for (const int64_t depth : {1, 7, 127, 129, 513})
    for (const int64_t outputs : {1, 7, 127, 129})
      for (const int64_t rows : {0, 1, 2, 3, 4, 5, 6, 7}) check_shape(rows, outputs, depth);
  check_shape(3, 129, 4095);
  check_shape(3, 4095, 7);
  check_shape(257, 65, 7);  // more than a section of rows
  check_shape(3, 0, 7);
}

const driver::Check check("linear", driver::kLevels, check_linear);

}  // namespace
