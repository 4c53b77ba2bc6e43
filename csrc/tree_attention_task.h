// One instruction level's tree attention: included by levels.h. A panel is 64 rows of 64 floats; a head's features lie
// in dim / 64 panels, rounded up, zeros behind the last.

#include "product_tile.h"

constexpr int64_t kTile = kTreeTile, kPanelFloats = kTile * kWidth;

ALWAYS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of tokens [count, dim], into panels [panels, 64 tokens, 64 features].
void take_rows(const float* from, int64_t stride, int64_t count, int64_t dim, float scale, float* to) {
  const Vec factor = Vec::broadcast(scale);
  for (int64_t d = 0; d < dim; d += kWidth, to += kPanelFloats)
    for (int64_t row = 0; row < count; ++row)
      for (int64_t i = 0; i < kWidth; i += kLanes) {
        const int64_t left = dim - d - i;
        (left > 0 ? load_upto(from + row * stride + d + i, left) * factor : Vec::broadcast(0.0f))
            .store(to + row * kWidth + i);
      }
}

// The transpose, into panels [panels, 64 features, 64 tokens].
void take_columns(const float* from, int64_t stride, int64_t count, int64_t dim, float* to) {
  for (int64_t d = 0; d < dim; ++d) {
    float* row = to + d * kWidth;
    for (int64_t token = 0; token < count; ++token) row[token] = from[token * stride + d];
    for (int64_t token = count; token < kTile; ++token) row[token] = 0.0f;
  }
}

// Panels back into rows of tokens.
void give_rows(const float* from, int64_t count, int64_t dim, float scale, float* to, int64_t stride) {
  const Vec factor = Vec::broadcast(scale);
  for (int64_t d = 0; d < dim; d += kWidth, from += kPanelFloats)
    for (int64_t row = 0; row < count; ++row)
      for (int64_t i = 0; i < kWidth && d + i < dim; i += kLanes)
        store_upto(Vec::load(from + row * kWidth + i) * factor, to + row * stride + d + i, dim - d - i);
}

// A tile of keys: tokens [start, start + count), and how far its subtrees reach.
struct Keys {
  int64_t start, count, nearest, farthest;
};

ALWAYS_INLINE Keys keys_at(const TreeAttentionArguments& a, int64_t start, int64_t stop) {
  Keys keys{start, least(kTile, stop - start), a.end[start], a.end[start]};
  for (int64_t j = start; j < start + keys.count; ++j) {
    keys.nearest = least(keys.nearest, a.end[j]);
    keys.farthest = a.end[j] > keys.farthest ? a.end[j] : keys.farthest;
  }
  return keys;
}

// What of a tile of keys queries see: `reach` holds end[j] - start, 0 behind the last key. Distances in a window below
// 2^24 are exact.
struct Mask {
  bool whole;
  float reach[kTile], index[kTile];

  Mask(const TreeAttentionArguments& a, const Keys& keys, int64_t first, int64_t last) {
    whole = keys.count == kTile && keys.start + keys.count <= first + 1 && keys.nearest >= last;
    for (int64_t j = 0; j < kTile; ++j) {
      reach[j] = j < keys.count ? float(a.end[keys.start + j] - keys.start) : 0.0f;
      index[j] = float(j);
    }
  }

  // x where the query, `query` tokens behind the first key, sees key j + lane, `hidden` elsewhere.
  ALWAYS_INLINE Vec operator()(Vec x, int64_t query, int64_t j, Vec hidden) const {
    const Vec reached = where_less(Vec::broadcast(float(query)), Vec::load(reach + j), x, hidden);
    return where_less(Vec::load(index + j), Vec::broadcast(float(query + 1)), reached, hidden);
  }
};

// totals [rows, 64] = rows of features, in panels, times the transposed keys or values of a tile.
ALWAYS_INLINE void scores_of(const float* rows_panels, int64_t rows, const float* columns_panels, int64_t count,
                             int64_t dim, float* totals) {
  for (int64_t d = 0; d < dim; d += kWidth)
    for (int64_t r = 0; r < rows; r += kGroup)
      group<false>(rows_panels + d * kTile + r * kWidth, kWidth, least(kGroup, rows - r), columns_panels + d * kWidth,
                   count, least(kWidth, dim - d), d == 0, totals + r * kWidth);
}

// totals, in panels, += weights [rows, 64] times the rows of a tile; Across: the transposed weights.
template <bool Across>
ALWAYS_INLINE void add_weighted(const float* weights, int64_t rows, const float* panels, int64_t units, int64_t dim,
                                float* totals) {
  for (int64_t d = 0; d < dim; d += kWidth)
    for (int64_t r = 0; r < rows; r += kGroup)
      group<Across>(weights + (Across ? r : r * kWidth), kWidth, least(kGroup, rows - r), panels + d * kTile,
                    least(kWidth, dim - d), units, false, totals + d * kTile + r * kWidth);
}

struct Layout {
  int64_t start, stop, panels;  // the window, and panels of a head
  ALWAYS_INLINE float* block(float* memory, int64_t token) const {
    return memory + (token - start) / kTile * panels * kPanelFloats;
  }
};

// The scores of a tile become exp(score - the row's new maximum), whose sums go to the totals; `kept`: what the old
// sums are multiplied with.
void soften(const Mask& mask, int64_t query, int64_t rows, int64_t count, float* scores, float* most, float* total,
            float* kept) {
  const Vec lowest = Vec::broadcast(-INFINITY);
  float sums[kTile];
  for (int64_t i = 0; i < rows; ++i) {
    float* row = scores + i * kWidth;
    Vec highest = lowest;
    for (int64_t j = 0; j < count; j += kLanes) {
      Vec x = Vec::load(row + j);
      if (!mask.whole) {
        x = mask(x, query + i, j, lowest);
        x.store(row + j);
      }
      highest = larger(x, highest);
    }
    const float before = most[i];
    most[i] = larger(max(highest), before);
    const float base = most[i] == -INFINITY ? 0.0f : most[i];
    kept[i] = before - base;
    Vec sum_of_row = Vec::broadcast(0.0f);
    for (int64_t j = 0; j < count; j += kLanes) {
      const Vec weight = exp(Vec::load(row + j) - Vec::broadcast(base));
      weight.store(row + j);
      sum_of_row = sum_of_row + weight;
    }
    sums[i] = sum(sum_of_row);
  }
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int64_t left = rows - i;
    const Vec keep = exp(load_upto(kept + i, left));
    store_upto(keep, kept + i, left);
    store_upto(fma(keep, load_upto(total + i, left), load_upto(sums + i, left)), total + i, left);
  }
}

void forward(const TreeAttentionArguments& a, int64_t group_index, int64_t window, float* memory) {
  const Layout at{a.bounds[window], a.bounds[window + 1], (a.dim + kWidth - 1) / kWidth};
  const int64_t blocks = (at.stop - at.start + kTile - 1) / kTile, tile = at.panels * kPanelFloats;
  float *keys = memory, *values = keys + blocks * tile, *queries = values + blocks * tile, *sums = queries + tile;
  float *scores = sums + tile, *most = scores + kPanelFloats, *total = most + kTile, *kept = total + kTile;
  for (int64_t k = at.start; k < at.stop; k += kTile) {
    const int64_t count = least(kTile, at.stop - k), offset = group_index * a.dim;
    take_columns(a.k + k * a.k_stride + offset, a.k_stride, count, a.dim, at.block(keys, k));
    take_rows(a.v + k * a.v_stride + offset, a.v_stride, count, a.dim, 1.0f, at.block(values, k));
  }
  const int64_t heads = a.heads / a.groups, width = a.heads * a.dim;
  for (int64_t head = group_index * heads; head < (group_index + 1) * heads; ++head)
    for (int64_t q = at.start; q < at.stop; q += kTile) {
      const int64_t rows = least(kTile, at.stop - q);
      take_rows(a.q + q * a.q_stride + head * a.dim, a.q_stride, rows, a.dim, 1.0f / std::sqrt(float(a.dim)), queries);
      for (int64_t i = 0; i < tile; ++i) sums[i] = 0.0f;
      for (int64_t i = 0; i < kTile; ++i) most[i] = -INFINITY, total[i] = 0.0f;
      for (int64_t k = at.start; k < q + rows; k += kTile) {
        const Keys seen = keys_at(a, k, at.stop);
        if (seen.farthest <= q) continue;
        const Mask mask(a, seen, q, q + rows);
        scores_of(queries, rows, at.block(keys, k), seen.count, a.dim, scores);
        soften(mask, q - k, rows, seen.count, scores, most, total, kept);
        for (int64_t d = 0; d < a.dim; d += kWidth)
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < kWidth; j += kLanes) {
              float* sum = sums + d * kTile + i * kWidth + j;
              (Vec::load(sum) * Vec::broadcast(kept[i])).store(sum);
            }
        add_weighted<false>(scores, rows, at.block(values, k), seen.count, a.dim, sums);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const Vec sum = Vec::broadcast(total[i]);
        float* out = a.out + (q + i) * width + head * a.dim;
        for (int64_t d = 0; d < a.dim; d += kLanes)
          store_upto(Vec::load(sums + d / kWidth * kPanelFloats + i * kWidth + d % kWidth) / sum, out + d, a.dim - d);
        a.lse[head * a.tokens + q + i] = float(double(most[i]) + std::log(double(total[i])));
      }
    }
}

// Of a query: the sum of out times its gradient.
ALWAYS_INLINE float delta_of(const float* out, const float* dout, int64_t dim) {
  Vec products = Vec::broadcast(0.0f);
  for (int64_t d = 0; d < dim; d += kLanes)
    products = fma(load_upto(out + d, dim - d), load_upto(dout + d, dim - d), products);
  return sum(products);
}

// Scores become the softmax's weights, and their gradients those of the scores.
void weights_and_gradients(const Mask& mask, int64_t query, int64_t rows, int64_t count, const float* lse,
                           const float* delta, float* scores, float* gradients) {
  const Vec zero = Vec::broadcast(0.0f);
  for (int64_t i = 0; i < rows; ++i) {
    const Vec base = Vec::broadcast(lse[i]), less = Vec::broadcast(delta[i]);
    for (int64_t j = 0; j < count; j += kLanes) {
      float *score = scores + i * kWidth + j, *gradient = gradients + i * kWidth + j;
      Vec weight = exp(Vec::load(score) - base);
      if (!mask.whole) weight = mask(weight, query + i, j, zero);
      weight.store(score);
      (weight * (Vec::load(gradient) - less)).store(gradient);
    }
  }
}

void backward(const TreeAttentionArguments& a, int64_t group_index, int64_t window, float* memory) {
  const Layout at{a.bounds[window], a.bounds[window + 1], (a.dim + kWidth - 1) / kWidth};
  const int64_t blocks = (at.stop - at.start + kTile - 1) / kTile, tile = at.panels * kPanelFloats;
  float *keys = memory, *keys_across = keys + blocks * tile, *values_across = keys_across + blocks * tile;
  float *dkeys = values_across + blocks * tile, *dvalues = dkeys + blocks * tile, *queries = dvalues + blocks * tile;
  float *douts = queries + tile, *dqueries = douts + tile, *scores = dqueries + tile;
  float *gradients = scores + kPanelFloats, *delta = gradients + kPanelFloats;
  for (int64_t k = at.start; k < at.stop; k += kTile) {
    const int64_t count = least(kTile, at.stop - k), offset = group_index * a.dim;
    take_rows(a.k + k * a.k_stride + offset, a.k_stride, count, a.dim, 1.0f, at.block(keys, k));
    take_columns(a.k + k * a.k_stride + offset, a.k_stride, count, a.dim, at.block(keys_across, k));
    take_columns(a.v + k * a.v_stride + offset, a.v_stride, count, a.dim, at.block(values_across, k));
  }
  for (int64_t i = 0; i < 2 * blocks * tile; ++i) dkeys[i] = 0.0f;
  const int64_t heads = a.heads / a.groups, width = a.heads * a.dim;
  const float scale = 1.0f / std::sqrt(float(a.dim));
  for (int64_t head = group_index * heads; head < (group_index + 1) * heads; ++head)
    for (int64_t q = at.start; q < at.stop; q += kTile) {
      const int64_t rows = least(kTile, at.stop - q), first = q * width + head * a.dim;
      take_rows(a.q + q * a.q_stride + head * a.dim, a.q_stride, rows, a.dim, scale, queries);
      take_rows(a.dout + first, width, rows, a.dim, 1.0f, douts);
      for (int64_t i = 0; i < rows; ++i)
        delta[i] = delta_of(a.out + first + i * width, a.dout + first + i * width, a.dim);
      for (int64_t i = 0; i < tile; ++i) dqueries[i] = 0.0f;
      for (int64_t k = at.start; k < q + rows; k += kTile) {
        const Keys seen = keys_at(a, k, at.stop);
        if (seen.farthest <= q) continue;
        const Mask mask(a, seen, q, q + rows);
        scores_of(queries, rows, at.block(keys_across, k), seen.count, a.dim, scores);
        scores_of(douts, rows, at.block(values_across, k), seen.count, a.dim, gradients);
        weights_and_gradients(mask, q - k, rows, seen.count, a.lse + head * a.tokens + q, delta, scores, gradients);
        add_weighted<false>(gradients, rows, at.block(keys, k), seen.count, a.dim, dqueries);
        add_weighted<true>(gradients, seen.count, queries, rows, a.dim, at.block(dkeys, k));
        add_weighted<true>(scores, seen.count, douts, rows, a.dim, at.block(dvalues, k));
      }
      give_rows(dqueries, rows, a.dim, scale, a.dq + first, width);
    }
  for (int64_t k = at.start; k < at.stop; k += kTile) {
    const int64_t count = least(kTile, at.stop - k), row = a.groups * a.dim;
    give_rows(at.block(dkeys, k), count, a.dim, 1.0f, a.dk + k * row + group_index * a.dim, row);
    give_rows(at.block(dvalues, k), count, a.dim, 1.0f, a.dv + k * row + group_index * a.dim, row);
  }
}

void run(const TreeAttentionArguments& a, int64_t group_index, int64_t window, float* memory) {
  a.dout ? backward(a, group_index, window, memory) : forward(a, group_index, window, memory);
}
