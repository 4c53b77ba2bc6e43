#include "product.h"

#include <algorithm>
#include <cstring>

#include "linear_pack.h"
#include "scratch.h"
#include "threads.h"

#define SELFREWARD_BODY "product_run.h"
#include "levels.h"

namespace selfreward {
namespace {

constexpr int64_t kPackedColumns = int64_t{1} << 22;  // floats of b that are packed at a time: 16 MB
constexpr int64_t kPackedRows = int64_t{1} << 20;     // and of a transposed a

// The panel of the columns first .. first + width of b, [depth, 64], zeros behind the last.
void pack_columns(const Matrix& b, int64_t first, int64_t width, int64_t depth, float* to) {
  if (b.transposed) {
    pack_units(width, depth, 0, to, [&](int64_t column, int64_t k) { return b.data[(first + column) * b.stride + k]; });
    if (width < kPanel)
      for (int64_t k = 0; k < depth; ++k) std::fill(to + k * kPanel + width, to + (k + 1) * kPanel, 0.0f);
    return;
  }
  for (int64_t k = 0; k < depth; ++k, to += kPanel) {
    std::memcpy(to, b.data + k * b.stride + first, size_t(width) * sizeof(float));
    if (width < kPanel) std::fill(to + width, to + kPanel, 0.0f);
  }
}

// The rows first .. first + rows of a transposed a, rows at most a group: [depth, 6]; what is behind the last is not
// read.
void pack_rows(const Matrix& a, int64_t first, int64_t rows, int64_t depth, float* to) {
  if (rows == kProductGroup) {
    for (int64_t k = 0; k < depth; ++k)
      std::memcpy(to + k * kProductGroup, a.data + k * a.stride + first, kProductGroup * sizeof(float));
    return;
  }
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t row = 0; row < rows; ++row) to[k * kProductGroup + row] = a.data[k * a.stride + first + row];
}

int64_t whole(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Panels and sections of one block, shared out: the panels of a section one behind the other, so that its rows stay in
// the second-level cache.
void multiply(const ProductBlock& block, int threads, ProductRun run) {
  const int64_t sections = whole(block.rows, kProductSection), panels = whole(block.columns, kPanel);
  const int64_t runs = std::min(panels, std::max<int64_t>(1, whole(8 * threads, sections)));
  parallel_for(sections * runs, threads,
               [&](int64_t i) { run(block, i / runs, panels * (i % runs) / runs, panels * (i % runs + 1) / runs); });
}

}  // namespace

Level<ProductRun> product_level(int index) { return level_at(index); }

void product(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, int64_t rows, int64_t columns,
             int64_t depth, bool add, int threads, ProductRun run) {
  thread_local Scratch for_columns, for_rows;
  if (double(rows) * double(columns) * double(depth) < 2e6 && !share_little()) threads = 1;  // 15 microseconds
  const int64_t panels_at_once = std::max<int64_t>(1, kPackedColumns / (depth * kPanel));
  const int64_t rows_at_once =
      a.transposed ? std::max<int64_t>(1, kPackedRows / (depth * kProductSection)) * kProductSection : rows;
  for (int64_t column = 0; column < columns; column += panels_at_once * kPanel) {
    const int64_t width = std::min(panels_at_once * kPanel, columns - column), panels = whole(width, kPanel);
    float* packed = for_columns.floats(panels * depth * kPanel);
    parallel_for(panels, threads, [&](int64_t i) {
      pack_columns(b, column + i * kPanel, std::min(kPanel, width - i * kPanel), depth, packed + i * depth * kPanel);
    });
    for (int64_t row = 0; row < rows; row += rows_at_once) {
      ProductBlock block{a.data + row * a.stride,
                         a.stride,
                         false,
                         packed,
                         out + row * out_stride + column,
                         out_stride,
                         std::min(rows_at_once, rows - row),
                         width,
                         depth,
                         add};
      if (a.transposed) {
        const int64_t groups = whole(block.rows, kProductGroup), pieces = std::min<int64_t>(groups, 8 * threads);
        float* to = for_rows.floats(groups * depth * kProductGroup);
        parallel_for(pieces, threads, [&](int64_t i) {
          for (int64_t g = groups * i / pieces; g < groups * (i + 1) / pieces; ++g)
            pack_rows(a, row + g * kProductGroup, std::min(kProductGroup, block.rows - g * kProductGroup), depth,
                      to + g * depth * kProductGroup);
        });
        block.a = to;
        block.packed = true;
      }
      multiply(block, threads, run);
    }
  }
}

}  // namespace selfreward
