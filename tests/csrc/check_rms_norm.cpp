#include "driver.h"
#include "rms_norm.h"

namespace {

void check_rms_norm() {
  for (const int64_t dim : {1, 7, 127, 129, 4095})
    for (const int64_t rows : {0, 1, 61}) {  // many: a difference of roundings moves the bits of some rows only
      driver::Agreement agreement;
      driver::every_way(selfreward::rms_norm_level, driver::shape_of("rows", rows, "dim", dim),
                        [&](auto run, int threads, int slack) {
                          const driver::Buffer<float> x("x", rows * dim, slack), weight("weight", dim, slack);
                          const driver::Buffer<float> out("out", rows * dim, slack);
                          driver::Random random(1);
                          random.fill(x), random.fill(weight);
                          selfreward::rms_norm({x, weight, out, rows, dim, 1e-5f}, threads, run);
                          agreement.check_finite(out);
                        });
    }
}

const driver::Check check("rms_norm", driver::kLevels, check_rms_norm);

}  // namespace
