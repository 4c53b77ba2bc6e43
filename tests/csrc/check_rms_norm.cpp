#include "driver.h"
#include "rms_norm.h"

namespace {

// Many rows: a difference of roundings moves the bits of some rows only.
void check_shape(int64_t rows, int64_t dim, bool add) {
  driver::Agreement agreement;
  driver::every_way(selfreward::rms_norm_level, driver::shape_of("rows", rows, "dim", dim, "add", add),
                    [&](auto run, int threads, int slack) {
                      const driver::Buffer<float> x("x", rows * dim, slack), weight("weight", dim, slack);
                      const driver::Buffer<float> branch("branch", rows * dim, slack), sum("sum", rows * dim, slack);
                      const driver::Buffer<float> out("out", rows * dim, slack);
                      driver::Random random(1);
                      random.fill(x), random.fill(weight), random.fill(branch);
                      const float* added = add ? branch.begin() : nullptr;
                      selfreward::rms_norm({x, added, weight, add ? sum.begin() : nullptr, out, rows, dim, 1e-5f},
                                           threads, run);
                      agreement.check_finite(out);
                      if (add) agreement.check_finite(sum);
                    });
}

void check_rms_norm() {
  for (const int64_t dim : {1, 7, 127, 129, 4095})
    for (const int64_t rows : {0, 1, 61})
      for (const bool add : {false, true}) check_shape(rows, dim, add);
}

const driver::Check check("rms_norm", driver::kLevels, check_rms_norm);

}  // namespace
