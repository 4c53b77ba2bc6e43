#include <algorithm>
#include <cstring>

#include "chunk_attention.h"
#include "driver.h"

namespace {

struct Shape {
  int64_t rows, heads, groups, dim, size;
};

// The first chunk is all rows', and so is the second of those that have one; further chunks are each row's own.
struct Work {
  std::vector<int64_t> positions, items;
  int64_t pages = 2;

  explicit Work(const Shape& s) {
    for (int64_t row = 0; row < s.rows; ++row) positions.push_back((row + 1) * s.size * 7 / (2 * s.rows));
    if (s.rows) add(0, 0, 0, s.rows);
    int64_t second = 0;  // the first row that has the chunk: positions ascend
    while (second < s.rows && positions[size_t(second)] < s.size) ++second;
    if (second < s.rows) add(1, 1, second, s.rows);
    for (int64_t row = 0; row < s.rows; ++row)
      for (int64_t chunk = 2; chunk * s.size <= positions[size_t(row)]; ++chunk) add(++pages, chunk, row, row + 1);
    ++pages;  // the last one is named, mostly, and nothing lies behind it
  }

  void add(int64_t page, int64_t chunk, int64_t first, int64_t last) {
    items.insert(items.end(), {page, chunk, first, last});
  }

  // The slots of an item's page that one of its rows sees.
  int64_t seen(const int64_t* item, int64_t size) const {
    int64_t most = 0;
    for (int64_t row = item[2]; row < item[3]; ++row)
      most = std::max(most, std::min(size, positions[size_t(row)] + 1 - item[1] * size));
    return most;
  }
};

// A number of fp32 or, the upper half of it, of bf16.
void set(float& at, float value) { at = value; }
void set(uint16_t& at, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  at = uint16_t(bits >> 16);
}

// Fills the slots that are seen and no others: all else stays NaN, pages that no item names too.
template <typename T>
void fill_pages(const Shape& s, const Work& work, T* keys, T* values) {
  driver::Random random(4);
  for (size_t i = 0; i < work.items.size(); i += 4) {
    const int64_t seen = work.seen(&work.items[i], s.size);
    for (int64_t group = 0; group < s.groups; ++group) {
      const int64_t page = (work.items[i] * s.groups + group) * s.dim * s.size;
      for (int64_t d = 0; d < s.dim; ++d)
        for (int64_t slot = 0; slot < seen; ++slot) {
          set(keys[page + d * s.size + slot], 3.0f * random.uniform());
          set(values[page + slot * s.dim + d], random.uniform());
        }
    }
  }
}

// With a pause before the work of every thread, not only before the choice of the kernels.
selfreward::ChunkAttentionRun unhurried(selfreward::ChunkAttentionRun run) {
  static selfreward::ChunkAttentionRun chosen;
  chosen = run;
  return +[](bool bf16) {
    selfreward::ChunkAttentionKernels kernels = chosen(bf16);
    kernels.fold_group = driver::pausing(kernels.fold_group);
    kernels.partial = driver::pausing(kernels.partial);
    return kernels;
  };
}

template <typename T>
void check_pages(const Shape& s) {
  const Work work(s);
  driver::Agreement agreement;
  const std::string shape = driver::shape_of("rows", s.rows, "heads", s.heads, "groups", s.groups, "dim", s.dim) +
                            driver::shape_of(", size", s.size, "bytes", sizeof(T));
  driver::every_way(selfreward::chunk_attention_level, shape, [&](auto run, int threads, int slack) {
    const int64_t count = s.rows * s.heads * s.dim, pages = work.pages * s.groups * s.dim * s.size;
    const driver::Buffer<float> q("q", count, slack), out("out", count, slack);
    const driver::Buffer<T> keys("key_pages", pages, slack), values("value_pages", pages, slack);
    const driver::Buffer<int64_t> items("items", work.items, slack), positions("positions", work.positions, slack);
    driver::Random(5).fill(q);
    fill_pages<T>(s, work, keys, values);
    const int64_t item_count = items.size() / 4;
    selfreward::chunk_attention({q, keys.begin(), values.begin(), sizeof(T) == 2, items, positions, out, s.rows,
                                 s.heads, s.groups, s.dim, s.size, item_count},
                                threads, threads > 1 ? unhurried(run) : run);
    agreement.check_finite(out);
  });
}

void check_shape(const Shape& s) {
  check_pages<float>(s);
  check_pages<uint16_t>(s);
}

void check_chunk_attention() {
  for (const int64_t dim : {1, 7, 64, 127, 129})
    for (const int64_t size : {1, 7, 64, 127, 129}) {
      check_shape({1, 1, 1, dim, size});
      check_shape({3, 6, 3, dim, size});
      check_shape({7, 10, 2, dim, size});  // 35 queries of a group: more than a block of them
    }
  for (const int64_t dim : {1, 7, 129}) check_shape({35, 4, 2, dim, 7});  // many rows share the first chunks
  check_shape({2, 1, 1, 4095, 7});
  check_shape({2, 2, 1, 7, 4095});
  check_shape({0, 2, 1, 7, 7});
}

const driver::Check check("chunk_attention", driver::kLevels, check_chunk_attention);

}  // namespace
