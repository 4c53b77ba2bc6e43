#include "adamw.h"
#include "driver.h"

namespace {

void check_adamw() {
  for (const int64_t count : {0, 1, 15, 17, 127, 129, 1000})
    for (const int64_t first : {0, 1, 120}) {
      driver::Agreement agreement;
      driver::every_way(selfreward::adamw_level, driver::shape_of("count", count, "first", first),
                        [&](auto run, int threads, int slack) {
                          const driver::Buffer<uint16_t> weight("weight", count, slack);
                          const driver::Buffer<uint16_t> grad("grad", count, slack);
                          const driver::Buffer<float> mean("mean", count, slack), square("square", count, slack);
                          driver::Random random(3);
                          random.fill(mean, 1.0f);
                          for (int64_t i = 0; i < count; ++i) {
                            weight[i] = uint16_t(0x3C00 + i % 512);
                            grad[i] = uint16_t(0xBC00 + i % 512);
                            square[i] = float(i % 7);
                          }
                          selfreward::adamw({weight, grad, mean, square, count, 0xFEDCBA9876543210u, uint64_t(first), 3,
                                             0.9f, 0.1f, 0.95f, 0.05f, 1e-8f, 0.999f, 1e-3f, 1.5f, 0.5f},
                                            threads, run);
                          agreement.check(weight);
                          agreement.check_finite(mean);
                          agreement.check_finite(square);
                        });
    }
}

const driver::Check check("adamw", driver::kLevels, check_adamw);

}  // namespace
