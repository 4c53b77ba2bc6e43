// RoPE and the write to the pages in one pass over q, k and v. The rounding is that of kernels/rope.py: no FMA; to bf16
// pages it is to the nearest, ties to even.
//
// Loop order: rows are shared out to the threads in runs. In a run blocks of 16 rows, groups, rows: neighbouring rows
// of a sequence write neighbouring slots, so a key page's lines (a feature has one for 16 slots) are fetched once for
// the block. Where the next slot lies elsewhere its lines are asked for ahead of the writes. Then the copies, in order.
//
// Measured on one thread of an AMD EPYC (family 26, AVX-512), microseconds with the call from Python, pages of 64 out
// of 600 MB that are in no cache; before: no asking ahead. Decode: every row has a page of its own, and a key touches
// 64 or 128 lines of it: 16 GB/s of them.
//                12 heads of 64: decode 1    32   prefill 512    32 of 128: decode 8   in 8 groups: decode 32
//   before                            4.6   110           305                    141                      167
//   fp32                              5.8   112           323                    127                      143
//   bf16                              5.3    98           285                    111                      128

#include "rope_write.h"

#include <algorithm>
#include <cstring>

#include "runs.h"

namespace selfreward {
namespace {

constexpr int64_t kRows = 16;

}  // namespace
}  // namespace selfreward

#define SELFREWARD_BODY "rope_write_rows.h"
#include "levels.h"

namespace selfreward {
namespace {

// In the order of the copies: what one wrote the next may read.
template <typename T>
void copy_slots(const RopeWriteArguments& a) {
  const int64_t page = a.dim * a.size;
  T *keys = static_cast<T*>(a.key_pages), *values = static_cast<T*>(a.value_pages);
  for (int64_t i = 0; i < a.copy_count; ++i)
    for (int64_t group = 0; group < a.groups; ++group) {
      const int64_t *copy = a.copies + 3 * i, tokens = copy[2];
      const int64_t from = (copy[0] * a.groups + group) * page, to = (copy[1] * a.groups + group) * page;
      for (int64_t d = 0; d < page; d += a.size)
        std::memcpy(keys + to + d, keys + from + d, size_t(tokens) * sizeof(T));
      std::memcpy(values + to, values + from, size_t(tokens * a.dim) * sizeof(T));
    }
}

}  // namespace

Level<RopeWriteRows> rope_write_level(int index) { return level_at(index); }

void rope_write(const RopeWriteArguments& a, int threads, RopeWriteRows rows) {
  parallel_runs(Runs(a.rows, 16 * a.dim * (a.heads + 4 * a.groups), threads), threads,
                [&](int64_t, int64_t first, int64_t last) { rows(a, first, last); });
  a.bf16 ? copy_slots<uint16_t>(a) : copy_slots<float>(a);
}

}  // namespace selfreward
