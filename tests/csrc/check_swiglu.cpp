#include "driver.h"
#include "swiglu.h"

namespace {

void check_swiglu() {
  for (const int64_t ffn : {1, 7, 127, 129, 4095})
    for (const int64_t rows : {0, 1, 7}) {
      driver::Agreement agreement;
      driver::every_way(selfreward::swiglu_level, driver::shape_of("rows", rows, "ffn", ffn),
                        [&](auto run, int threads, int slack) {
                          const driver::Buffer<float> gate_up("gate_up", 2 * rows * ffn, slack);
                          const driver::Buffer<float> out("out", rows * ffn, slack);
                          driver::Random(2).fill(gate_up, 200.0f);  // beyond where e^x is 0 or infinite
                          selfreward::swiglu({gate_up, out, rows, ffn}, threads, run);
                          agreement.check_finite(out);
                        });
    }
}

const driver::Check check("swiglu", driver::kLevels, check_swiglu);

}  // namespace
