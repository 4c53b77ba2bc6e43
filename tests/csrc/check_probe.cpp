#include "driver.h"
#include "probe.h"

namespace {

void check_probe() {
  driver::every_way(selfreward::probe_level, "rounds 7", [](auto run, int threads, int) {
    driver::require(selfreward::probe({nullptr, 7}, threads, run) > 0.0, "no rate");
  });
  for (const int64_t count : {384, 385, 4095})
    driver::every_way(selfreward::probe_level, driver::shape_of("floats", count),
                      [&](auto run, int threads, int slack) {
                        const driver::Buffer<float> memory("memory", count, slack);
                        memory.fill(1.0f);
                        driver::require(selfreward::probe({memory, count}, threads, run) > 0.0, "no rate");
                      });
}

const driver::Check check("probe", driver::kLevels, check_probe);

}  // namespace
