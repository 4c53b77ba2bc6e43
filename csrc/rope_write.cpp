// Pair (i, i + D/2) of a query or key turns by its row's angle; keys and values go to their slots of the pages.
//
// Products and sums are rounded one by one (-ffp-contract=off), so the bits are those of torch's kernels/rope.py and of
// any instruction set: plain loops, compiled once. A job is one group of keys and values with its query heads: no two
// jobs touch the same memory, and a job's copies follow its writes.
//
// Measured on one thread of an AMD EPYC (family 26), 12 heads of 64, pages of 64, microseconds with the call from
// Python, in brackets torch's reference: 1 row 13 (40), 64 rows 62 (121), 512 rows 434 (548; on two threads 293).

#include "rope_write.h"

#include <cstring>

#include "threads.h"

namespace selfreward {
namespace {

inline void turn(const float* x, const float* cos, const float* sin, int64_t half, float* out) {
  for (int64_t i = 0; i < half; ++i) {
    out[i] = x[i] * cos[i] - x[i + half] * sin[i];
    out[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
  }
}

// The key goes into a column of its page: dim stores, `size` apart.
inline void turn_into_column(const float* x, const float* cos, const float* sin, int64_t half, int64_t size,
                             float* column) {
  for (int64_t i = 0; i < half; ++i) {
    column[i * size] = x[i] * cos[i] - x[i + half] * sin[i];
    column[(i + half) * size] = x[i + half] * cos[i] + x[i] * sin[i];
  }
}

void group(const RopeWriteArguments& a, int64_t g) {
  const int64_t half = a.dim / 2, heads = a.heads / a.groups, page_floats = a.dim * a.size;
  for (int64_t row = 0; row < a.rows; ++row) {
    const float *cos = a.cos + row * half, *sin = a.sin + row * half;
    for (int64_t h = g * heads; h < (g + 1) * heads; ++h)
      turn(a.q + row * a.q_stride + h * a.dim, cos, sin, half, a.out + (row * a.heads + h) * a.dim);
    const int64_t slot = a.slots[row] % a.size, page = (a.slots[row] / a.size * a.groups + g) * page_floats;
    turn_into_column(a.k + row * a.k_stride + g * a.dim, cos, sin, half, a.size, a.key_pages + page + slot);
    std::memcpy(a.value_pages + page + slot * a.dim, a.v + row * a.v_stride + g * a.dim, size_t(a.dim) * sizeof(float));
  }
  for (int64_t i = 0; i < a.copy_count; ++i) {
    const int64_t* copy = a.copies + 3 * i;
    const int64_t source = (copy[0] * a.groups + g) * page_floats, target = (copy[1] * a.groups + g) * page_floats;
    for (int64_t d = 0; d < a.dim; ++d)
      std::memcpy(a.key_pages + target + d * a.size, a.key_pages + source + d * a.size,
                  size_t(copy[2]) * sizeof(float));
    std::memcpy(a.value_pages + target, a.value_pages + source, size_t(copy[2] * a.dim) * sizeof(float));
  }
}

}  // namespace

void rope_write(const RopeWriteArguments& a, int threads) {
  const bool little = (a.rows * (a.heads + 2 * a.groups) + a.copy_count * a.size * a.groups) * a.dim < (1 << 16);
  parallel_for(a.groups, little ? 1 : threads, [&](int64_t g) { group(a, g); });
}

}  // namespace selfreward
