#include <algorithm>
#include <vector>

#include "driver.h"
#include "linear.h"
#include "linear_bf16.h"
#include "linear_int8.h"

namespace selfreward {

// For driver::every_way, which finds it here.
inline LinearKernel pausing(LinearKernel kernel) {
  kernel.prepare = driver::pausing(kernel.prepare);
  kernel.panels = driver::pausing(kernel.panels);
  return kernel;
}

}  // namespace selfreward

namespace {

using selfreward::kPanel;

int64_t panels_of(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

// What pads the last panel reaches no result: all ones there are NaN as fp32 and as bf16, and 255 as 8 bits.
template <typename T>
void require_untouched(const driver::Buffer<T>& packed, int64_t outputs, int64_t units) {
  const int64_t parts = outputs ? packed.size() / (panels_of(outputs) * units * kPanel) : 0;
  const auto* bytes = reinterpret_cast<const unsigned char*>(packed.begin());
  for (int64_t i = 0; i < packed.size(); ++i)
    if (i / (units * kPanel * parts) * kPanel + i / parts % kPanel >= outputs)
      for (size_t b = 0; b < sizeof(T); ++b)
        driver::require(bytes[size_t(i) * sizeof(T) + b] == 0xFF, "packing wrote behind the last output");
}

void check_fp32(int64_t rows, int64_t outputs, int64_t depth) {
  driver::Agreement agreement;
  driver::every_way(selfreward::linear_level, driver::shape_of("rows", rows, "outputs", outputs, "depth", depth),
                    [&](auto run, int threads, int slack) {
                      const driver::Buffer<float> x("x", rows * depth, slack), weight("weight", outputs * depth, slack);
                      const driver::Buffer<float> packed("packed", panels_of(outputs) * depth * kPanel, slack);
                      const driver::Buffer<float> out("out", rows * outputs, slack),
                          back("back", outputs * depth, slack);
                      driver::Random random(3);
                      random.fill(x), random.fill(weight);
                      selfreward::linear_pack(weight, outputs, depth, 0, packed);
                      require_untouched(packed, outputs, depth);
                      selfreward::linear_unpack(packed, outputs, depth, 0, back);
                      driver::require(std::equal(back.begin(), back.end(), weight.begin()), "unpacked: other weights");
                      selfreward::linear({x, packed, out, rows, outputs, depth}, threads, run);
                      agreement.check_finite(out);
                    });
}

void check_bf16(int64_t rows, int64_t outputs, int64_t depth) {
  const int64_t units = (depth + 1) / 2;
  driver::Agreement agreement;
  driver::every_way(
      selfreward::linear_bf16_level, driver::shape_of("rows", rows, "outputs", outputs, "depth", depth),
      [&](auto run, int threads, int slack) {
        const driver::Buffer<float> x("x", rows * depth, slack), out("out", rows * outputs, slack);
        const driver::Buffer<uint16_t> weight("weight", outputs * depth, slack), back("back", outputs * depth, slack);
        const driver::Buffer<uint16_t> packed("packed", panels_of(outputs) * units * kPanel * 2, slack);
        driver::Random random(3);
        random.fill(x);
        for (uint16_t& bits : weight) bits = uint16_t(0x3C00 | (random.next() & 0x81FF));  // 2^-7 to 2^-3, either sign
        selfreward::linear_pack_bf16(weight, outputs, depth, 0, packed);
        require_untouched(packed, outputs, units);
        selfreward::linear_unpack_bf16(packed, outputs, depth, 0, back);
        driver::require(std::equal(back.begin(), back.end(), weight.begin()), "unpacked: other weights");
        selfreward::linear_prepared(x, depth, 0, {nullptr, packed, out, rows, outputs, units}, threads, run);
        agreement.check_finite(out);
      });
}

void check_int8(int64_t rows, int64_t outputs, int64_t depth) {
  const int64_t groups = (depth + selfreward::kInt8Group - 1) / selfreward::kInt8Group;
  const int64_t units = groups * selfreward::kInt8Group / 4;
  driver::Agreement agreement;
  driver::every_way(selfreward::linear_int8_level, driver::shape_of("rows", rows, "outputs", outputs, "depth", depth),
                    [&](auto run, int threads, int slack) {
                      const driver::Buffer<float> x("x", rows * depth, slack), weight("weight", outputs * depth, slack);
                      const driver::Buffer<float> out("out", rows * outputs, slack);
                      const driver::Buffer<float> scales("scales", panels_of(outputs) * kPanel, slack);
                      const driver::Buffer<uint8_t> packed("packed", panels_of(outputs) * units * kPanel * 4, slack);
                      driver::Random random(3);
                      random.fill(x), random.fill(weight);
                      selfreward::linear_pack_int8(weight, outputs, depth, 0, packed, scales);
                      require_untouched(packed, outputs, units);
                      selfreward::LinearArguments arguments{nullptr, packed, out, rows, outputs, units};
                      arguments.scales = scales;
                      selfreward::linear_prepared(x, depth, groups, arguments, threads, run);
                      agreement.check_finite(out);
                    });
}

void all_shapes(void (*check_shape)(int64_t rows, int64_t outputs, int64_t depth)) {
  for (const int64_t depth : {1, 7, 127, 129, 513})
    for (const int64_t outputs : {1, 7, 127, 129})
      for (const int64_t rows : {0, 1, 2, 3, 4, 5, 6, 7}) check_shape(rows, outputs, depth);
  check_shape(3, 129, 4095);
  check_shape(3, 4095, 7);
  check_shape(257, 65, 7);  // more than a section of rows
  check_shape(3, 0, 7);
}

const driver::Check fp32("linear", driver::kLevels, [] { all_shapes(check_fp32); });
const driver::Check bf16("linear_bf16", {"avx512bf16", "avx512", "avx2", "portable"}, [] { all_shapes(check_bf16); });
const driver::Check int8("linear_int8", {"avx512vnni", "avxvnni", "avx2", "portable"}, [] { all_shapes(check_int8); });

}  // namespace
