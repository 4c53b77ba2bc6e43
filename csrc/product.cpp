// The trainer's products: out = a b for matrices that may be transposed, so that one function is a linear forward
// (x W^T), the gradient of its input (dy W) and that of its weight (dy^T x). The order of the sums is the sampler's:
// within each 256 of the depth one ascending FMA chain from zero, chains added in ascending order to what is there. So
// a row's bits depend neither on the other rows nor on the instruction level nor on the threads.
//
// Loop order: columns of b in blocks of 8 MB and slabs of 2,048 of the depth, packed into panels of 64 columns by all
// threads; rows of a, of a transposed one packed in groups of 6, in sections of 252; panels; chains of 256 (64 KB of a
// panel, which stay in the second-level cache); groups of 6 rows, 6 x 64 sums in registers. Sums of a section wait in a
// buffer between chains.
//
// AMD EPYC (Zen 5: family 26, model 2; virtual, 2 cores), 2 threads, 2,048 rows x in x out, ours / torch 2.13 in
// GFLOP/s, in turns, packing included; FMA peak in the same minute 573:
//
//                      768 x 2,304   768 x 768   768 x 4,096   2,048 x 768
//   forward             399 / 221    357 / 232    458 / 223     394 / 233
//   gradient of x       412 / 224    349 / 233    477 / 234     431 / 226
//   gradient of W       374 / 224    319 / 226    383 / 228     382 / 214
//
// Packing on every call costs, by its bytes, 2 to 4% of 2,048 rows; a cache of packed weights would have to be
// told of every update.

#include "product.h"

#include <algorithm>
#include <cstring>

#include "compiler.h"
#include "linear.h"
#include "scratch.h"
#include "threads.h"

#define SELFREWARD_BODY "product_run.h"
#include "levels.h"

namespace selfreward {
namespace {

constexpr int64_t kSlab = 8 * 256;                    // units of the depth at a time: whole chains
constexpr int64_t kPackedColumns = int64_t{1} << 21;  // floats of b that are packed at a time: 8 MB
constexpr int64_t kPackedRows = int64_t{1} << 20;     // and of a transposed a: 4 MB
constexpr int64_t kPackedTogether = 14 * kProductGroup;

// Rows of a matrix lie thousands of bytes apart, too far for the processor to guess the next: so many ahead are asked
// for.
constexpr int64_t kAhead = 8;

void ask(const float* at, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) PREFETCH(at + i);
}

// The columns first .. first + width of the units from `unit` on of b: [depth, 64], zeros behind the last column.
void pack_columns(const Matrix& b, int64_t first, int64_t width, int64_t unit, int64_t depth, float* to) {
  if (width < kPanel) std::fill(to, to + depth * kPanel, 0.0f);
  if (!b.transposed) {
    const float* from = b.data + unit * b.stride + first;
    for (int64_t k = 0; k < depth; ++k) {
      ask(from + std::min(k + kAhead, depth - 1) * b.stride, width);
      std::memcpy(to + k * kPanel, from + k * b.stride, size_t(width) * sizeof(float));
    }
    return;
  }
  constexpr int64_t kLine = 16;  // floats of a cache line: the ones behind it are asked for, which lie far apart
  const float* from = b.data + first * b.stride + unit;
  for (int64_t k = 0; k < depth; k += kLine) {
    const int64_t stop = std::min(k + kLine, depth), next = std::min(k + 2 * kLine, depth - 1);
    for (int64_t column = 0; column < width; ++column) {
      const float* at = from + column * b.stride;
      PREFETCH(at + next);
      for (int64_t i = k; i < stop; ++i) to[i * kPanel + column] = at[i];
    }
  }
}

// The rows first .. first + rows of a transposed a: [groups, depth, 6]; what is behind the last row is not read. The
// depth outside, so that what lies side by side in a is read at once: group by group each line would come three times.
void pack_rows(const Matrix& a, int64_t first, int64_t rows, int64_t unit, int64_t depth, float* to) {
  const float* from = a.data + unit * a.stride + first;
  for (int64_t k = 0; k < depth; ++k, from += a.stride, to += kProductGroup) {
    if (k + kAhead < depth) ask(from + kAhead * a.stride, rows);
    int64_t row = 0;
    for (; rows - row >= kProductGroup; row += kProductGroup)
      std::memcpy(to + row * depth, from + row, kProductGroup * sizeof(float));
    for (int64_t last = row; row < rows; ++row) to[last * depth + row - last] = from[row];
  }
}

int64_t whole(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Calls work(i) for every i below `count`, in as many pieces as keep the threads busy.
template <typename Work>
void in_pieces(int64_t count, int threads, const Work& work) {
  const int64_t pieces = std::min<int64_t>(count, 8 * threads);
  parallel_for(pieces, threads, [&](int64_t piece) {
    for (int64_t i = count * piece / pieces; i < count * (piece + 1) / pieces; ++i) work(i);
  });
}

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
  if (double(rows) * double(columns) * double(depth) / 130e3 < worth_sharing()) threads = 1;  // 130 a nanosecond
  const int64_t slab = std::min(depth, kSlab), panels_at_once = std::max<int64_t>(1, kPackedColumns / (slab * kPanel));
  const int64_t sections = std::max<int64_t>(1, kPackedRows / (slab * kProductSection));
  const int64_t rows_at_once = a.transposed ? sections * kProductSection : rows;
  for (int64_t column = 0; column < columns; column += panels_at_once * kPanel)
    for (int64_t unit = 0; unit < depth; unit += kSlab) {
      const int64_t width = std::min(panels_at_once * kPanel, columns - column), units = std::min(kSlab, depth - unit);
      float* packed = for_columns.floats(std::min(panels_at_once, whole(columns, kPanel)) * slab * kPanel);
      in_pieces(whole(width, kPanel), threads, [&](int64_t i) {
        const int64_t first = i * kPanel;
        pack_columns(b, column + first, std::min(kPanel, width - first), unit, units, packed + first * units);
      });
      for (int64_t row = 0; row < rows; row += rows_at_once) {
        ProductBlock block{};
        block.b = packed;
        block.out = out + row * out_stride + column;
        block.out_stride = out_stride;
        block.rows = std::min(rows_at_once, rows - row), block.columns = width, block.depth = units;
        block.add = add || unit > 0;
        if (a.transposed) {
          float* to = for_rows.floats(whole(std::min(rows, rows_at_once), kProductGroup) * kProductGroup * slab);
          in_pieces(whole(block.rows, kPackedTogether), threads, [&](int64_t i) {
            const int64_t first = i * kPackedTogether;
            pack_rows(a, row + first, std::min(kPackedTogether, block.rows - first), unit, units, to + first * units);
          });
          block.a = to;
          block.packed = true;
        } else {
          block.a = a.data + row * a.stride + unit;
          block.stride = a.stride;
        }
        multiply(block, threads, run);
      }
    }
}

}  // namespace selfreward
