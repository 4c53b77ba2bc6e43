// Partials of an item with few queries: a group's page is read from memory once, its keys and then its values, while
// those of the next page are asked for. Included by chunk_attention_rows.h.

// Rows of a page, [depth, columns], and how far behind them lies what is needed next: every line that is read here is
// asked for there.
template <typename T>
struct Matrix {
  const T* at;
  int64_t stride, depth, columns, ahead;
  Matrix from(int64_t column) const { return {at + column, stride, depth, columns - column, ahead}; }
};

// out[i] = sum over k of factors[i][k] * b[k, :], in ascending FMA chains from zero over kChain values of k, whose
// results are added in ascending order, for Q queries and V vectors of columns, of which the last has `last` if it is
// Partial. Ragged: query i takes the k < depths[i].
template <int Q, int V, bool Partial, bool Ragged, typename T>
ALWAYS_INLINE void stream_tile(const float* const* factors, const Matrix<T>& b, const int64_t* depths, int last,
                               float* const* out) {
  Vec totals[Q][V], sums[Q][V];
  UNROLL for (int i = 0; i < Q; ++i) UNROLL for (int v = 0; v < V; ++v) totals[i][v] = Vec::broadcast(0.0f);
  for (int64_t k = 0; k < b.depth;) {
    UNROLL for (int i = 0; i < Q; ++i) UNROLL for (int v = 0; v < V; ++v) sums[i][v] = Vec::broadcast(0.0f);
    for (const int64_t stop = std::min(b.depth, k + kChain); k < stop; ++k) {
      Vec x[V];
      UNROLL for (int v = 0; v < V; ++v) {
        const T* at = b.at + k * b.stride + v * kLanes;
        if (v * kLanes * sizeof(T) % 64 == 0) PREFETCH(at + b.ahead);
        x[v] = Partial && v == V - 1 ? load_wide_part(at, last) : load_wide(at);
      }
      UNROLL for (int i = 0; i < Q; ++i) {
        if (Ragged && k >= depths[i]) continue;
        const Vec factor = Vec::broadcast(factors[i][k]);
        UNROLL for (int v = 0; v < V; ++v) sums[i][v] = fma(factor, x[v], sums[i][v]);
      }
    }
    UNROLL for (int i = 0; i < Q; ++i) UNROLL for (int v = 0; v < V; ++v) totals[i][v] = totals[i][v] + sums[i][v];
  }
  UNROLL for (int i = 0; i < Q; ++i) UNROLL for (int v = 0; v < V; ++v) totals[i][v].store(out[i] + v * kLanes);
}

// Any number of columns; rows of `out` have room for whole vectors.
template <int Q, bool Ragged, typename T>
void stream(const float* const* factors, const Matrix<T>& b, const int64_t* depths, float* const* out) {
  constexpr int kWide = 4;
  float* to[Q];
  for (int64_t at = 0; at < b.columns;) {
    const int64_t left = b.columns - at;
    UNROLL for (int i = 0; i < Q; ++i) to[i] = out[i] + at;
    if (left >= kWide * kLanes) {
      stream_tile<Q, kWide, false, Ragged>(factors, b.from(at), depths, 0, to);
      at += kWide * kLanes;
    } else if (left >= 2 * kLanes) {
      stream_tile<Q, 2, false, Ragged>(factors, b.from(at), depths, 0, to);
      at += 2 * kLanes;
    } else if (left >= kLanes) {
      stream_tile<Q, 1, false, Ragged>(factors, b.from(at), depths, 0, to);
      at += kLanes;
    } else {
      stream_tile<Q, 1, true, Ragged>(factors, b.from(at), depths, int(left), to);
      at = b.columns;
    }
  }
}

// factors [queries, stride] times `b` goes to out(i) for every query i, depth(i) deep.
template <typename T, typename Depth, typename Out>
ALWAYS_INLINE void multiply(int64_t queries, const float* factors, int64_t stride, Matrix<T> b, Depth depth, Out out) {
  const auto step = [&](int64_t i, auto count) {
    constexpr int Q = count();
    const float* from[Q];
    float* to[Q];
    int64_t depths[Q];
    bool ragged = false;
    for (int j = 0; j < Q; ++j) {
      from[j] = factors + (i + j) * stride;
      to[j] = out(i + j);
      depths[j] = depth(i + j);
      ragged = ragged || depths[j] != b.depth;
    }
    ragged ? stream<Q, true>(from, b, depths, to) : stream<Q, false>(from, b, depths, to);
    b.ahead = 0;  // asked for once
  };
  int64_t i = 0;
  for (; queries - i >= 4; i += 4) step(i, std::integral_constant<int, 4>{});
  for (; queries - i >= 2; i += 2) step(i, std::integral_constant<int, 2>{});
  if (i < queries) step(i, std::integral_constant<int, 1>{});
}

// Partials of the item's queries [rows, heads]. `next`: the item that is likely to come next here.
template <typename T>
void partial(const ChunkAttentionArguments& a, const ChunkAttentionItem& item, const ChunkAttentionItem& next,
             const ChunkAttentionState& to, float* scratch) {
  const int64_t width = whole(a.dim), slots = whole(a.size), heads = a.heads / a.groups;
  const int64_t rows = item.last_row - item.first_row, queries = rows * heads, elements = a.dim * a.size;
  float *q = scratch, *scores = q + queries * width;
  int64_t row_seen[kMany], most = 0;
  for (int64_t row = 0; row < rows; ++row) {
    row_seen[row] = seen_of(a, item.first_row + row, item.chunk);
    most = std::max(most, row_seen[row]);
  }
  const auto seen = [&](int64_t i) { return row_seen[heads == 1 ? i : i / heads]; };
  for (int64_t group = 0; group < a.groups; ++group) {
    const int64_t page = item.page * a.groups + group;
    const int64_t ahead = (group + 1 < a.groups ? 1 : next.page * a.groups - page) * elements;
    const Matrix<T> keys{static_cast<const T*>(a.key_pages) + page * elements, a.size, a.dim, most, ahead};
    const Matrix<T> values{static_cast<const T*>(a.value_pages) + page * elements, a.dim, most, a.dim, ahead};
    const auto query = [&](int64_t i) {
      return heads == 1 ? i * a.heads + group : i / heads * a.heads + group * heads + i % heads;
    };
    for (int64_t row = 0; row < rows; ++row)
      scale_queries(a, item.first_row + row, group * heads, heads, q + row * heads * width);
    multiply(queries, q, width, keys, [&](int64_t) { return a.dim; }, [&](int64_t i) { return scores + i * slots; });
    for (int64_t i = 0; i < queries; ++i)
      softmax_weights(scores + i * slots, seen(i), &to.max[query(i)], &to.sum[query(i)]);
    multiply(queries, scores, slots, values, seen, [&](int64_t i) { return to.values + query(i) * width; });
  }
}
