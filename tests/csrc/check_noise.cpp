// Gumbel noise and dropout masks: rows, without threads.

#include "driver.h"
#include "dropout.h"
#include "gumbel.h"

namespace {

void check_gumbel() {
  for (const int64_t vocab : {0, 1, 7, 127, 129, 257, 4095}) {
    driver::Agreement agreement;
    driver::every_way(selfreward::gumbel_level, driver::shape_of("vocab", vocab), [&](auto row, int, int slack) {
      const driver::Buffer<float> out("out", vocab, slack);
      row(0xFEDCBA9876543210u, 0xFFFFFFFFu, 3, 0, vocab, out);
      agreement.check_finite(out);
    });
  }
}

void check_dropout() {
  for (const int64_t units : {0, 1, 7, 127, 129, 4095})
    for (const int slack : {0, 1, 3}) {
      driver::enter(driver::shape_of("units", units), "", 1, slack);
      const driver::Buffer<uint8_t> out("out", units, slack);
      selfreward::dropout_row(0xFEDCBA9876543210u, 0x0123456789ABCDEFu, 7, 65535, 1u << 31, units, out);
      for (const uint8_t kept : out) driver::require(kept <= 1, "a unit is neither kept nor dropped");
    }
}

const driver::Check gumbel("gumbel", driver::kLevels, check_gumbel);
const driver::Check dropout("dropout", {}, check_dropout);

}  // namespace
