// One instruction level's rope_write: included by levels.h.

#include "bf16_lanes.h"

struct Pair {
  Vec first, second;
};

// Up to 16 features of each half of a head, from the i-th on: first cos - second sin, second cos + first sin, products
// and sums rounded one by one.
ALWAYS_INLINE Pair turned(const float* x, const float* cos, const float* sin, int64_t half, int64_t i) {
  const Vec c = load_upto(cos + i, half - i), s = load_upto(sin + i, half - i);
  const Vec first = load_upto(x + i, half - i), second = load_upto(x + half + i, half - i);
  return {first * c - second * s, second * c + first * s};
}

ALWAYS_INLINE void write_query(const RopeWriteArguments& a, int64_t row, int64_t head) {
  const int64_t half = a.dim / 2;
  const float* q = a.q + row * a.q_stride + head * a.dim;
  float* out = a.out + (row * a.heads + head) * a.dim;
  for (int64_t i = 0; i < half; i += kLanes) {
    const Pair pair = turned(q, a.cos + row * half, a.sin + row * half, half, i);
    store_upto(pair.first, out + i, half - i);
    store_upto(pair.second, out + half + i, half - i);
  }
}

ALWAYS_INLINE void narrow(const float* from, int64_t count, float* to) {
  std::memcpy(to, from, size_t(count) * sizeof(float));
}
ALWAYS_INLINE void narrow(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; i += kLanes) store_narrow_upto(load_upto(from + i, count - i), to + i, count - i);
}

// Asks for the lines that a row's key and value of a group go to.
template <typename T>
ALWAYS_INLINE void ask(const T* keys, const T* values, int64_t dim, int64_t size) {
  for (int64_t d = 0; d < dim; ++d) PREFETCH_WRITE(keys + d * size);
  for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T))) PREFETCH_WRITE(values + d);
}

template <typename T>
ALWAYS_INLINE void write_key_and_value(const RopeWriteArguments& a, int64_t row, int64_t group, T* keys, T* values) {
  const int64_t half = a.dim / 2;
  const float *k = a.k + row * a.k_stride + group * a.dim, *v = a.v + row * a.v_stride + group * a.dim;
  for (int64_t i = 0; i < half; i += kLanes) {
    const Pair pair = turned(k, a.cos + row * half, a.sin + row * half, half, i);
    T first[kLanes], second[kLanes];
    store_narrow_upto(pair.first, first, kLanes);
    store_narrow_upto(pair.second, second, kLanes);
    for (int64_t d = i; d < half && d < i + kLanes; ++d) {
      keys[d * a.size] = first[d - i];
      keys[(half + d) * a.size] = second[d - i];
    }
  }
  narrow(v, a.dim, values);
}

template <typename T>
void write_rows(const RopeWriteArguments& a, int64_t first, int64_t last) {
  const int64_t heads = a.heads / a.groups, page = a.dim * a.size;
  struct Place {
    T *key, *value;  // of the first group
  } places[kRows];
  for (int64_t start = first; start < last; start += kRows) {
    const int64_t rows = std::min(kRows, last - start);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t block = a.slots[start + i] / a.size, slot = a.slots[start + i] % a.size;
      places[i] = {static_cast<T*>(a.key_pages) + block * a.groups * page + slot,
                   static_cast<T*>(a.value_pages) + block * a.groups * page + slot * a.dim};
    }
    for (int64_t group = 0; group < a.groups; ++group)
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = start + i, next = i + 1 < rows ? i + 1 : 0, next_group = group + (next == 0);
        if (next_group < a.groups && places[next].key != places[i].key + 1)  // else in the lines of this one, mostly
          ask(places[next].key + next_group * page, places[next].value + next_group * page, a.dim, a.size);
        for (int64_t head = group * heads; head < (group + 1) * heads; ++head) write_query(a, row, head);
        write_key_and_value(a, row, group, places[i].key + group * page, places[i].value + group * page);
      }
  }
}

void run(const RopeWriteArguments& a, int64_t first, int64_t last) {
  a.bf16 ? write_rows<uint16_t>(a, first, last) : write_rows<float>(a, first, last);
}
