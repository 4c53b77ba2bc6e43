// One instruction level's rope_write: included by levels.h.

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

ALWAYS_INLINE void write_key_and_value(const RopeWriteArguments& a, int64_t row, int64_t group) {
  const int64_t half = a.dim / 2, slot = a.slots[row] % a.size;
  const int64_t page = (a.slots[row] / a.size * a.groups + group) * a.dim * a.size;
  const float* k = a.k + row * a.k_stride + group * a.dim;
  float* keys = a.key_pages + page + slot;
  for (int64_t i = 0; i < half; i += kLanes) {
    const Pair pair = turned(k, a.cos + row * half, a.sin + row * half, half, i);
    float first[kLanes], second[kLanes];
    pair.first.store(first);
    pair.second.store(second);
    for (int64_t d = i; d < half && d < i + kLanes; ++d) {
      keys[d * a.size] = first[d - i];
      keys[(half + d) * a.size] = second[d - i];
    }
  }
  std::memcpy(a.value_pages + page + slot * a.dim, a.v + row * a.v_stride + group * a.dim,
              size_t(a.dim) * sizeof(float));
}

void run(const RopeWriteArguments& a, int64_t first, int64_t last) {
  const int64_t heads = a.heads / a.groups;
  for (int64_t start = 0; start < a.rows; start += kRows)
    for (int64_t group = first; group < last; ++group)
      for (int64_t row = start; row < std::min(a.rows, start + kRows); ++row) {
        for (int64_t head = group * heads; head < (group + 1) * heads; ++head) write_query(a, row, head);
        write_key_and_value(a, row, group);
      }
  for (int64_t i = 0; i < a.copy_count; ++i) {
    const int64_t *copy = a.copies + 3 * i, tokens = copy[2];
    for (int64_t group = first; group < last; ++group) {
      const int64_t from = (copy[0] * a.groups + group) * a.dim * a.size;
      const int64_t to = (copy[1] * a.groups + group) * a.dim * a.size;
      for (int64_t d = 0; d < a.dim * a.size; d += a.size)
        std::memcpy(a.key_pages + to + d, a.key_pages + from + d, size_t(tokens) * sizeof(float));
      std::memcpy(a.value_pages + to, a.value_pages + from, size_t(tokens * a.dim) * sizeof(float));
    }
  }
}
