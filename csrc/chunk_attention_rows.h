// One instruction level's chunk_attention: included by levels.h.

// Registers: queries x vectors of a tile's sums at most. Its size changes no bits: a sum is one chain whatever is
// beside it.
#if SELFREWARD_LANES == 16
constexpr int kQueries = 4, kVectors = 4;
#else
constexpr int kQueries = 2, kVectors = 2;
#endif

// How far the sums of a tile's queries go: query q to each[q]; `least` and `most` of them.
struct Depths {
  const int64_t* each;
  int64_t least, most;
};

// A matrix in a page, and how far behind it lies what is needed next: every line that is read here is asked for there.
struct Matrix {
  const float* at;
  int64_t stride, ahead;
  Matrix from(int64_t column) const { return {at + column, stride, ahead}; }
};

// sums[q, :] += a[q, k] * b[k, :]; Ragged: only where k < each[q].
template <int Q, int V, bool Partial, bool Ragged>
ALWAYS_INLINE void add_product(const float* a, int64_t a_stride, const Matrix& b, int64_t k, const int64_t* each,
                               int last, Vec (&sums)[Q][V]) {
  Vec x[V];
  for (int v = 0; v < V; ++v) {
    const float* at = b.at + k * b.stride + v * kLanes;
    PREFETCH(at + b.ahead);
    x[v] = Partial && v == V - 1 ? Vec::load_part(at, last) : Vec::load(at);
  }
  for (int q = 0; q < Q; ++q) {
    if (Ragged && k >= each[q]) continue;
    const Vec factor = Vec::broadcast(a[q * a_stride + k]);
    for (int v = 0; v < V; ++v) sums[q][v] = fma(factor, x[v], sums[q][v]);
  }
}

template <int Q, int V>
ALWAYS_INLINE void clear(Vec (&sums)[Q][V]) {
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < V; ++v) sums[q][v] = Vec::broadcast(0.0f);
}

template <int Q, int V>
ALWAYS_INLINE void add(const Vec (&sums)[Q][V], Vec (&totals)[Q][V]) {
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < V; ++v) totals[q][v] = totals[q][v] + sums[q][v];
}

// For Q queries and 16 V columns, of which the last vector has `last`: sum[q, :] = sum over k of a[q, k] * b[k, :] in
// ascending FMA chains from zero over kChain values of k, whose results are added in ascending order. Fold: out[q, :]
// becomes kept[q] * out[q, :] + (added[q] * sum[q, :]), else the sum. Rows of `out` have room for whole vectors.
template <int Q, int V, bool Partial, bool Fold>
ALWAYS_INLINE void tile(const float* a, int64_t a_stride, const Matrix& b, const Depths& depths, int last,
                        const float* kept, const float* added, float* out, int64_t out_stride) {
  Vec totals[Q][V], sums[Q][V];
  clear(totals);
  int64_t k = 0;
  while (depths.least - k >= kChain) {
    clear(sums);
    for (const int64_t stop = k + kChain; k < stop; ++k)
      add_product<Q, V, Partial, false>(a, a_stride, b, k, nullptr, last, sums);
    add(sums, totals);
  }
  while (k < depths.most) {
    clear(sums);
    const int64_t stop = std::min(depths.most, k + kChain);
    for (; k < std::min(depths.least, stop); ++k)
      add_product<Q, V, Partial, false>(a, a_stride, b, k, nullptr, last, sums);
    for (; Fold && k < stop; ++k)  // the depths of scores are all the same
      add_product<Q, V, Partial, true>(a, a_stride, b, k, depths.each, last, sums);
    add(sums, totals);
  }
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < V; ++v) {
      float* at = out + q * out_stride + v * kLanes;
      Vec x = totals[q][v];
      if (Fold) x = fma(Vec::broadcast(kept[q]), Vec::load(at), Vec::broadcast(added[q]) * x);
      x.store(at);
    }
}

// The tile for Q queries and any number of columns.
template <int Q, bool Fold>
inline void columns(const float* a, int64_t a_stride, const Matrix& b, const Depths& depths, int64_t count,
                    const float* kept, const float* added, float* out, int64_t out_stride) {
  constexpr int kWide = Q == 1 ? 4 : kVectors;
  int64_t at = 0;
  for (; count - at >= kWide * kLanes; at += kWide * kLanes)
    tile<Q, kWide, false, Fold>(a, a_stride, b.from(at), depths, 0, kept, added, out + at, out_stride);
  for (; count - at >= 2 * kLanes; at += 2 * kLanes)
    tile<Q, 2, false, Fold>(a, a_stride, b.from(at), depths, 0, kept, added, out + at, out_stride);
  for (; count - at >= kLanes; at += kLanes)
    tile<Q, 1, false, Fold>(a, a_stride, b.from(at), depths, 0, kept, added, out + at, out_stride);
  if (at < count)
    tile<Q, 1, true, Fold>(a, a_stride, b.from(at), depths, int(count - at), kept, added, out + at, out_stride);
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

// Folds maxima and sums of partials into those of the states and gives the factors for the weighted values:
// m' = max(m, p), kept = e^(m - m'), added = e^(p - m'), l' = kept l + (added pl).
ALWAYS_INLINE void merge(int64_t queries, const float* partial_max, const float* partial_sum, float* state_max,
                         float* state_sum, float* kept, float* added) {
  const Vec lowest = Vec::broadcast(-INFINITY), zero = Vec::broadcast(0.0f);
  for (int64_t i = 0; i < queries; i += kLanes) {
    const int64_t left = queries - i;
    const Vec before = load_upto(state_max + i, left), partial = load_upto(partial_max + i, left);
    const Vec m = larger(partial, before), base = where_less(lowest, m, m, zero);
    const Vec a = exp(before - base), b = exp(partial - base);
    store_upto(m, state_max + i, left);
    store_upto(fma(a, load_upto(state_sum + i, left), b * load_upto(partial_sum + i, left)), state_sum + i, left);
    a.store(kept + i);
    b.store(added + i);
  }
}

// Some queries of a job, `begin` and those behind it, and one group's page of theirs.
struct Block {
  const float *keys, *values;
  int64_t dim, size, ahead;  // ahead: from here to the page that comes next
  int64_t begin;
  const int64_t* seen;  // of the page's slots, by each query
};

template <int Q>
inline void score(const Block& block, const Scratch& s, int64_t at) {
  const int64_t count = *std::max_element(block.seen + at, block.seen + at + Q);
  columns<Q, false>(s.q + (block.begin + at) * s.width, s.width, {block.keys, block.size, at ? 0 : block.ahead},
                    {nullptr, block.dim, block.dim}, count, nullptr, nullptr, s.scores + at * s.slots, s.slots);
}

template <int Q>
inline void weigh(const Block& block, const Scratch& s, int64_t at) {
  const auto [least, most] = std::minmax_element(block.seen + at, block.seen + at + Q);
  columns<Q, true>(s.scores + at * s.slots, s.slots, {block.values, block.dim, at ? 0 : block.ahead},
                   {block.seen + at, *least, *most}, block.dim, s.kept + at, s.added + at,
                   s.state + (block.begin + at) * s.width, s.width);
}

// Folds the page into the states of `queries` <= kBlock queries.
void fold(const Block& block, int64_t queries, const Scratch& s) {
  int64_t at = 0;
  for (; queries - at >= kQueries; at += kQueries) score<kQueries>(block, s, at);
  if (kQueries > 2 && queries - at >= 2) score<2>(block, s, at), at += 2;
  if (at < queries) score<1>(block, s, at);
  for (int64_t i = 0; i < queries; ++i) {
    float* scores = s.scores + i * s.slots;
    for (int64_t slot = block.seen[i]; slot < whole(block.seen[i]); ++slot) scores[slot] = -INFINITY;
    softmax_weights(scores, block.seen[i], &s.partial_max[i], &s.partial_sum[i]);
  }
  merge(queries, s.partial_max, s.partial_sum, s.state_max + block.begin, s.state_sum + block.begin, s.kept, s.added);
  at = 0;
  for (; queries - at >= kQueries; at += kQueries) weigh<kQueries>(block, s, at);
  if (kQueries > 2 && queries - at >= 2) weigh<2>(block, s, at), at += 2;
  if (at < queries) weigh<1>(block, s, at);
}

// Folds the rows [from, to) of an item, one group of theirs; `first` is the group's first query of the job, that of
// the job's first row.
void fold_item(const ChunkAttentionArguments& a, const ChunkAttentionJob& job, int64_t page, int64_t next_page,
               int64_t chunk, int64_t from, int64_t to, int64_t first, const Scratch& s) {
  const int64_t heads = a.heads / a.groups, floats = a.dim * a.size, stop = (to - job.first_row) * heads;
  for (int64_t begin = (from - job.first_row) * heads; begin < stop; begin += kBlock) {
    const int64_t queries = std::min(kBlock, stop - begin);
    int64_t seen[kBlock];
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t row = job.first_row + (begin + i) / heads;
      seen[i] = std::min(a.size, a.positions[row] + 1 - chunk * a.size);
    }
    const int64_t ahead = (next_page - page) * floats;
    fold({a.key_pages + page * floats, a.value_pages + page * floats, a.dim, a.size, ahead, first + begin, seen},
         queries, s);
    next_page = page;  // asked for once
  }
}

// The job's query i is head i % heads of row i / heads % rows of group i / heads / rows, heads being those of a group.
void run(const ChunkAttentionArguments& a, const ChunkAttentionJob& job, float* memory) {
  const int64_t heads = a.heads / a.groups, rows = job.last_row - job.first_row;
  const int64_t queries = (job.last_group - job.first_group) * rows * heads;
  const Scratch s(a, queries, memory);
  const auto offset = [&](int64_t i) {  // of a query in q and out
    const int64_t row = job.first_row + i / heads % rows, group = job.first_group + i / heads / rows;
    return (row * a.heads + group * heads + i % heads) * a.dim;
  };
  const float scale = 1.0f / std::sqrt(float(a.dim));
  for (int64_t i = 0; i < queries; ++i) {
    const float* q = a.q + offset(i);
    for (int64_t d = 0; d < a.dim; ++d) s.q[i * s.width + d] = q[d] * scale;
    for (int64_t d = 0; d < s.width; ++d) s.state[i * s.width + d] = 0.0f;
    s.state_max[i] = -INFINITY;
    s.state_sum[i] = 0.0f;
  }
  for (int64_t index = 0; index < a.item_count; ++index) {
    const int64_t* item = a.items + 4 * index;
    const int64_t from = std::max(job.first_row, item[2]), to = std::min(job.last_row, item[3]);
    if (from >= to) continue;
    const int64_t* following = index + 1 < a.item_count ? item + 4 : item;  // not of this job, maybe, but mostly
    for (int64_t group = job.first_group; group < job.last_group; ++group) {
      const int64_t page = item[0] * a.groups + group;
      const int64_t next_page = group + 1 < job.last_group ? page + 1 : following[0] * a.groups + job.first_group;
      fold_item(a, job, page, next_page, item[1], from, to, (group - job.first_group) * rows * heads, s);
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    float* out = a.out + offset(i);
    const Vec total = Vec::broadcast(s.state_sum[i]);
    for (int64_t d = 0; d < a.dim; d += kLanes)
      store_upto(Vec::load(s.state + i * s.width + d) / total, out + d, a.dim - d);
  }
}
