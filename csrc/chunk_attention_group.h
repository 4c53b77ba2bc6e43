// Items with many queries: a group's page is widened into a place of its own, once for all queries of the job, and the
// work is two products of small matrices in the first-level cache. Included by chunk_attention_rows.h.

// Registers: queries x vectors of a tile's sums at most. Its size changes no bits: a sum is one chain whatever is
// beside it.
#if SELFREWARD_LANES == 16
constexpr int kQueries = 4, kVectors = 4;
#else
constexpr int kQueries = 2, kVectors = 2;
#endif

// sums[i, :] = sum over k of a[i, k] * b[k, :], in ascending FMA chains from zero over kChain values of k, whose
// results are added in ascending order, for Q rows of `a` and V vectors of `b`. Ragged: row i takes the k < depths[i],
// `least` and `most` of these.
template <bool Ragged, int Q, int V>
ALWAYS_INLINE void product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, const int64_t* depths,
                           int64_t least, int64_t most, Vec (&totals)[Q][V]) {
  UNROLL for (int i = 0; i < Q; ++i) UNROLL for (int v = 0; v < V; ++v) totals[i][v] = Vec::broadcast(0.0f);
  for (int64_t k = 0; k < most;) {
    Vec sums[Q][V];
    UNROLL for (int i = 0; i < Q; ++i) UNROLL for (int v = 0; v < V; ++v) sums[i][v] = Vec::broadcast(0.0f);
    const int64_t stop = std::min(most, k + kChain), plain = std::min(least, stop);
    for (; k < plain; ++k) {
      Vec x[V];
      UNROLL for (int v = 0; v < V; ++v) x[v] = Vec::load(b + k * b_stride + v * kLanes);
      UNROLL for (int i = 0; i < Q; ++i) {
        const Vec factor = Vec::broadcast(a[i * a_stride + k]);
        UNROLL for (int v = 0; v < V; ++v) sums[i][v] = fma(factor, x[v], sums[i][v]);
      }
    }
    for (; Ragged && k < stop; ++k) {
      Vec x[V];
      UNROLL for (int v = 0; v < V; ++v) x[v] = Vec::load(b + k * b_stride + v * kLanes);
      UNROLL for (int i = 0; i < Q; ++i) {
        if (k >= depths[i]) continue;
        const Vec factor = Vec::broadcast(a[i * a_stride + k]);
        UNROLL for (int v = 0; v < V; ++v) sums[i][v] = fma(factor, x[v], sums[i][v]);
      }
    }
    UNROLL for (int i = 0; i < Q; ++i) UNROLL for (int v = 0; v < V; ++v) totals[i][v] = totals[i][v] + sums[i][v];
  }
}

// Calls step(column, V) for all of `count` columns, a multiple of 16, V vectors of them at a time.
template <typename Step>
ALWAYS_INLINE void for_each_tile(int64_t count, Step step) {
  int64_t at = 0;
  for (; count - at >= kVectors * kLanes; at += kVectors * kLanes) step(at, std::integral_constant<int, kVectors>{});
  for (; at < count; at += kLanes) step(at, std::integral_constant<int, 1>{});
}

// [rows, columns] of a page, widened, into rows of whole vectors.
template <typename T>
void stage(const T* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < columns; i += kLanes)
      load_wide_upto(from + row * stride + i, columns - i).store(to + row * to_stride + i);
}

// Asks for one of so many parts of a page.
template <typename T>
void ask_part(const ChunkAttentionArguments& a, int64_t page, int64_t group, int64_t part, int64_t parts) {
  const int64_t elements = a.dim * a.size, last = (part + 1) * elements / parts;
  const T *keys = page_of<T>(a, a.key_pages, page, group), *values = page_of<T>(a, a.value_pages, page, group);
  for (int64_t i = part * elements / parts; i < last; i += 64 / int64_t(sizeof(T))) {
    PREFETCH_L2(keys + i);
    PREFETCH_L2(values + i);
  }
}

template <int Q>
void score_block(const GroupScratch& s, int64_t dim, int64_t begin, int64_t at, const int64_t* seen) {
  const int64_t count = *std::max_element(seen + at, seen + at + Q);
  for_each_tile(whole(count), [&](int64_t column, auto vectors) {
    constexpr int V = vectors();
    Vec totals[Q][V];
    product<false, Q, V>(s.q + (begin + at) * s.width, s.width, s.keys + column, s.slots, nullptr, dim, dim, totals);
    UNROLL for (int i = 0; i < Q; ++i) UNROLL for (int v = 0; v < V; ++v) totals[i][v].store(
        s.scores + (at + i) * s.slots + column + v * kLanes);
  });
}

template <int Q>
void weigh_block(const GroupScratch& s, int64_t begin, int64_t at, const int64_t* seen) {
  const auto [least, most] = std::minmax_element(seen + at, seen + at + Q);
  for_each_tile(s.width, [&](int64_t column, auto vectors) {
    constexpr int V = vectors();
    Vec totals[Q][V];
    product<true, Q, V>(s.scores + at * s.slots, s.slots, s.values + column, s.width, seen + at, *least, *most, totals);
    UNROLL for (int i = 0; i < Q; ++i) {
      const Vec keep = Vec::broadcast(s.kept[at + i]), add = Vec::broadcast(s.added[at + i]);
      float* to = s.state + (begin + at + i) * s.width + column;
      UNROLL for (int v = 0; v < V; ++v) fma(keep, Vec::load(to + v * kLanes), add * totals[i][v])
          .store(to + v * kLanes);
    }
  });
}

// Folds the page into the states of the queries [begin, begin + queries), at most kBlock.
void fold_block(const GroupScratch& s, int64_t dim, int64_t begin, int64_t queries, const int64_t* seen) {
  int64_t at = 0;
  for (; queries - at >= kQueries; at += kQueries) score_block<kQueries>(s, dim, begin, at, seen);
  for (; queries - at >= 2; at += 2) score_block<2>(s, dim, begin, at, seen);
  if (at < queries) score_block<1>(s, dim, begin, at, seen);
  for (int64_t i = 0; i < queries; ++i)
    softmax_weights(s.scores + i * s.slots, seen[i], &s.block_max[i], &s.block_sum[i]);
  merge(queries, s.block_max, s.block_sum, s.max + begin, s.sum + begin, s.kept, s.added);
  at = 0;
  for (; queries - at >= kQueries; at += kQueries) weigh_block<kQueries>(s, begin, at, seen);
  for (; queries - at >= 2; at += 2) weigh_block<2>(s, begin, at, seen);
  if (at < queries) weigh_block<1>(s, begin, at, seen);
}

// The job's query i is head i % heads of row i / heads, heads being those of the group.
template <typename T>
void fold_group(const ChunkAttentionArguments& a, const ChunkAttentionJob& job, float* memory) {
  const int64_t heads = a.heads / a.groups, rows = job.last_row - job.first_row;
  const GroupScratch s(a, rows * heads, memory);
  for (int64_t row = 0; row < rows; ++row)
    scale_queries(a, job.first_row + row, job.group * heads, heads, s.q + row * heads * s.width);
  std::fill(s.state, s.state + rows * heads * s.width, 0.0f);
  std::fill(s.max, s.max + rows * heads, -INFINITY);
  std::fill(s.sum, s.sum + rows * heads, 0.0f);
  for (int64_t index = 0; index < job.item_count; ++index) {
    const ChunkAttentionItem& item = job.items[index];
    const int64_t from = std::max(job.first_row, item.first_row), to = std::min(job.last_row, item.last_row);
    if (from >= to) continue;
    int64_t most = 0;
    for (int64_t row = from; row < to; ++row) most = std::max(most, seen_of(a, row, item.chunk));
    stage(page_of<T>(a, a.key_pages, item.page, job.group), a.size, a.dim, most, s.keys, s.slots);
    stage(page_of<T>(a, a.value_pages, item.page, job.group), a.dim, most, a.dim, s.values, s.width);
    const int64_t start = (from - job.first_row) * heads, stop = (to - job.first_row) * heads;
    const int64_t blocks = (stop - start + kBlock - 1) / kBlock,
                  next = job.items[std::min(index + 1, job.item_count - 1)].page;
    for (int64_t begin = start; begin < stop; begin += kBlock) {
      ask_part<T>(a, next, job.group, (begin - start) / kBlock, blocks);
      const int64_t queries = std::min(kBlock, stop - begin);
      int64_t seen[kBlock];
      for (int64_t i = 0; i < queries; ++i) seen[i] = seen_of(a, job.first_row + (begin + i) / heads, item.chunk);
      fold_block(s, a.dim, begin, queries, seen);
    }
  }
  for (int64_t row = job.first_row; row < job.last_row; ++row)
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t mine = (row - job.first_row) * heads + head, query = row * a.heads + job.group * heads + head;
      const float* state = s.state + mine * s.width;
      if (job.unfinished[row]) {
        job.states.max[query] = s.max[mine];
        job.states.sum[query] = s.sum[mine];
        std::copy(state, state + s.width, job.states.values + query * s.width);
      } else {
        divide(state, s.sum[mine], a.dim, a.out + query * a.dim);
      }
    }
}
