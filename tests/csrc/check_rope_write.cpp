#include <algorithm>

#include "driver.h"
#include "rope_write.h"

namespace {

struct Shape {
  int64_t rows, heads, groups, dim, size;
};

// Rows that lie apart, NaN between them; nothing lies behind the last one.
struct Rows {
  int64_t stride;
  driver::Buffer<float> buffer;

  Rows(const char* name, int64_t rows, int64_t width, int64_t gap, int slack)
      : stride(width + gap), buffer(name, rows ? (rows - 1) * stride + width : 0, slack) {
    driver::Random random(6);
    for (int64_t i = 0; i < buffer.size(); ++i)
      if (i % stride < width) buffer[i] = random.uniform();
  }
};

bool untouched(float value) { return std::isnan(value); }
bool untouched(uint16_t value) { return value == 0xFFFF; }

template <typename T>
void check_pages(const Shape& s, int64_t gap) {
  // Row r goes to slot r of the blocks from 1 on. Half of block 1's first tokens then go to block 0, and none to 2.
  const int64_t blocks = 3 + s.rows / s.size, copied = std::min(s.rows, s.size) / 2;
  std::vector<int64_t> slots;
  for (int64_t row = 0; row < s.rows; ++row) slots.push_back(s.size + row);
  const auto written = [&](int64_t block, int64_t slot) {
    return block == 0 ? slot < copied : (block - 1) * s.size + slot < s.rows;
  };
  driver::Agreement agreement;
  const std::string shape = driver::shape_of("rows", s.rows, "heads", s.heads, "groups", s.groups, "dim", s.dim) +
                            driver::shape_of(", size", s.size, "gap", gap, "bytes", sizeof(T));
  driver::every_way(selfreward::rope_write_level, shape, [&](auto run, int threads, int slack) {
    const Rows q("q", s.rows, s.heads * s.dim, gap, slack), k("k", s.rows, s.groups * s.dim, gap, slack);
    const Rows v("v", s.rows, s.groups * s.dim, gap, slack);
    const driver::Buffer<float> cos("cos", s.rows * s.dim / 2, slack), sin("sin", s.rows * s.dim / 2, slack);
    const driver::Buffer<int64_t> places("slots", slots, slack), copies("copies", {1, 0, copied, 1, 2, 0}, slack);
    const driver::Buffer<T> keys("key_pages", blocks * s.groups * s.dim * s.size, slack);
    const driver::Buffer<T> values("value_pages", keys.size(), slack);
    const driver::Buffer<float> out("out", s.rows * s.heads * s.dim, slack);
    driver::Random random(7);
    random.fill(cos), random.fill(sin);
    selfreward::rope_write({q.buffer, k.buffer,     v.buffer,       q.stride,       k.stride, v.stride, cos,
                            sin,      keys.begin(), values.begin(), sizeof(T) == 2, places,   copies,   out,
                            s.rows,   s.heads,      s.groups,       s.dim,          s.size,   2},
                           threads, run);
    agreement.check_finite(out), agreement.check(keys), agreement.check(values);
    for (int64_t i = 0; i < keys.size(); ++i) {
      const int64_t block = i / (s.groups * s.dim * s.size), key = i % s.size, value = i / s.dim % s.size;
      driver::require(untouched(keys[i]) != written(block, key), "a slot of key_pages is written, or is not");
      driver::require(untouched(values[i]) != written(block, value), "a slot of value_pages is written, or is not");
    }
  });
}

void check_shape(const Shape& s, int64_t gap) {
  check_pages<float>(s, gap);
  check_pages<uint16_t>(s, gap);
}

void check_rope_write() {
  for (const int64_t dim : {2, 14, 126, 130})
    for (const int64_t size : {1, 7, 64, 129})
      for (const int64_t gap : {0, 3}) {
        check_shape({1, 1, 1, dim, size}, gap);
        check_shape({19, 6, 3, dim, size}, gap);
      }
  check_shape({3, 2, 1, 4094, 7}, 1);
  check_shape({0, 2, 1, 14, 7}, 0);
}

const driver::Check check("rope_write", driver::kLevels, check_rope_write);

}  // namespace
