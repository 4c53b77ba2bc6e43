// One instruction level's chunk_attention: included by levels.h.

// Registers: heads x vectors of a tile's sums at most. Its size changes no bits: a sum is one chain whatever is beside
// it.
#if SELFREWARD_LANES == 16
constexpr int kHeads = 4, kVectors = 4;
#else
constexpr int kHeads = 2, kVectors = 2;
#endif

// out[h, :] = sum over k of a[h, k] * b[k, :] for H heads and 16 V columns, of which the last vector has `last`:
// ascending FMA chains from zero over kChain values of k, whose results are added in ascending order. Rows of `out`
// have room for whole vectors.
template <int H, int V, bool Partial>
ALWAYS_INLINE void tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* out,
                        int64_t out_stride, int last) {
  Vec totals[H][V];
  for (int h = 0; h < H; ++h)
    for (int v = 0; v < V; ++v) totals[h][v] = Vec::broadcast(0.0f);
  for (int64_t start = 0; start < depth; start += kChain) {
    const int64_t stop = depth - start < kChain ? depth : start + kChain;
    Vec sums[H][V];
    for (int h = 0; h < H; ++h)
      for (int v = 0; v < V; ++v) sums[h][v] = Vec::broadcast(0.0f);
    for (int64_t k = start; k < stop; ++k) {
      Vec x[V];
      for (int v = 0; v < V; ++v) {
        const float* at = b + k * b_stride + v * kLanes;
        x[v] = Partial && v == V - 1 ? Vec::load_part(at, last) : Vec::load(at);
      }
      for (int h = 0; h < H; ++h) {
        const Vec factor = Vec::broadcast(a[h * a_stride + k]);
        for (int v = 0; v < V; ++v) sums[h][v] = fma(factor, x[v], sums[h][v]);
      }
    }
    for (int h = 0; h < H; ++h)
      for (int v = 0; v < V; ++v) totals[h][v] = totals[h][v] + sums[h][v];
  }
  for (int h = 0; h < H; ++h)
    for (int v = 0; v < V; ++v) totals[h][v].store(out + h * out_stride + v * kLanes);
}

template <int H>
inline void columns(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, int64_t count,
                    float* out, int64_t out_stride) {
  constexpr int kWide = H == 1 ? 4 : kVectors;
  int64_t at = 0;
  for (; count - at >= kWide * kLanes; at += kWide * kLanes)
    tile<H, kWide, false>(a, a_stride, b + at, b_stride, depth, out + at, out_stride, 0);
  for (; count - at >= 2 * kLanes; at += 2 * kLanes)
    tile<H, 2, false>(a, a_stride, b + at, b_stride, depth, out + at, out_stride, 0);
  for (; count - at >= kLanes; at += kLanes)
    tile<H, 1, false>(a, a_stride, b + at, b_stride, depth, out + at, out_stride, 0);
  if (at < count) tile<H, 1, true>(a, a_stride, b + at, b_stride, depth, out + at, out_stride, int(count - at));
}

// out [heads, count] = a [heads, depth] x b [depth, count]
inline void product(int64_t heads, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                    int64_t count, float* out, int64_t out_stride) {
  int64_t h = 0;
  for (; heads - h >= kHeads; h += kHeads)
    columns<kHeads>(a + h * a_stride, a_stride, b, b_stride, depth, count, out + h * out_stride, out_stride);
  if (kHeads > 2 && heads - h >= 2) {
    columns<2>(a + h * a_stride, a_stride, b, b_stride, depth, count, out + h * out_stride, out_stride);
    h += 2;
  }
  if (h < heads) columns<1>(a + h * a_stride, a_stride, b, b_stride, depth, count, out + h * out_stride, out_stride);
}

// scores [count], padded with -inf to whole vectors, become exp(score - their maximum).
ALWAYS_INLINE void softmax_weights(float* scores, int64_t count, float* maximum, float* total) {
  Vec most = Vec::broadcast(-INFINITY);
  for (int64_t i = 0; i < count; i += kLanes) most = larger(Vec::load(scores + i), most);
  *maximum = max(most);
  // All scores -inf: weights of zero, not the NaN of -inf + inf.
  const Vec base = Vec::broadcast(*maximum == -INFINITY ? 0.0f : *maximum);
  Vec weights = Vec::broadcast(0.0f);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec weight = exp(Vec::load(scores + i) - base);
    weight.store(scores + i);
    weights = weights + weight;
  }
  *total = sum(weights);
}

// Folds a chunk's partial into the state of one head: m' = max(m, p), a = e^(m - m'), b = e^(p - m'), x' = a x + (b
// px).
ALWAYS_INLINE void merge(float* state_max, float* state_sum, float* state, float partial_max, float partial_sum,
                         const float* partial, int64_t width) {
  const float m = larger(partial_max, *state_max);
  const float base = m == -INFINITY ? 0.0f : m;
  float factors[kLanes] = {*state_max - base, partial_max - base};
  exp(Vec::load(factors)).store(factors);
  const Vec a = Vec::broadcast(factors[0]), b = Vec::broadcast(factors[1]);
  *state_max = m;
  *state_sum = std::fma(factors[0], *state_sum, factors[1] * partial_sum);
  for (int64_t i = 0; i < width; i += kLanes) fma(a, Vec::load(state + i), b * Vec::load(partial + i)).store(state + i);
}

void item(const ChunkAttentionArguments& a, int64_t row, int64_t group, const Scratch& s) {
  const int64_t heads = a.heads / a.groups, width = s.width, slots = s.slots;
  const int64_t offset = (row * a.heads + group * heads) * a.dim;  // of q and out
  const float scale = 1.0f / std::sqrt(float(a.dim));
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t d = 0; d < a.dim; ++d) s.q[h * width + d] = a.q[offset + h * a.dim + d] * scale;
    for (int64_t d = 0; d < width; ++d) s.state[h * width + d] = 0.0f;
    s.state_max[h] = -INFINITY;
    s.state_sum[h] = 0.0f;
  }
  const int64_t seen = a.positions[row] + 1;
  for (int64_t chunk = 0; chunk * a.size < seen; ++chunk) {
    const int64_t page = (a.tables[row * a.chunks + chunk] * a.groups + group) * a.dim * a.size;
    const int64_t left = seen - chunk * a.size, count = left < a.size ? left : a.size;  // visible slots
    product(heads, s.q, width, a.key_pages + page, a.size, a.dim, count, s.scores, slots);
    for (int64_t h = 0; h < heads; ++h) {
      float* scores = s.scores + h * slots;
      for (int64_t i = count; i < whole(count); ++i) scores[i] = -INFINITY;
      softmax_weights(scores, count, &s.partial_max[h], &s.partial_sum[h]);
    }
    product(heads, s.scores, slots, a.value_pages + page, a.dim, count, a.dim, s.partial, width);
    for (int64_t h = 0; h < heads; ++h)
      merge(&s.state_max[h], &s.state_sum[h], s.state + h * width, s.partial_max[h], s.partial_sum[h],
            s.partial + h * width, width);
  }
  for (int64_t h = 0; h < heads; ++h) {
    const Vec total = Vec::broadcast(s.state_sum[h]);
    for (int64_t d = 0; d < a.dim; d += kLanes)
      store_upto(Vec::load(s.state + h * width + d) / total, a.out + offset + h * a.dim + d, a.dim - d);
  }
}

void run(const ChunkAttentionArguments& a, int64_t first, int64_t last, float* memory) {
  const Scratch scratch(a, memory);
  for (int64_t i = first; i < last; ++i) item(a, i % a.rows, i / a.rows, scratch);
}
