// One instruction level's chunk_attention: included by levels.h.

#include "bf16_lanes.h"

template <typename T>
ALWAYS_INLINE const T* page_of(const ChunkAttentionArguments& a, const void* pages, int64_t page, int64_t group) {
  return static_cast<const T*>(pages) + (page * a.groups + group) * a.dim * a.size;
}

// The scaled queries of `row`, heads [first, first + count), padded with zeros.
ALWAYS_INLINE void scale_queries(const ChunkAttentionArguments& a, int64_t row, int64_t first, int64_t count,
                                 float* to) {
  const int64_t width = whole(a.dim);
  const Vec scale = Vec::broadcast(1.0f / std::sqrt(float(a.dim)));
  const float* q = a.q + (row * a.heads + first) * a.dim;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < width; d += kLanes)
      (load_upto(q + i * a.dim + d, a.dim - d) * scale).store(to + i * width + d);
}

// Scores [count], with room for whole vectors, become exp(score - their maximum).
ALWAYS_INLINE void softmax_weights(float* scores, int64_t count, float* maximum, float* total) {
  for (int64_t slot = count; slot < whole(count); ++slot) scores[slot] = -INFINITY;
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
    store_upto(a, kept + i, left);
    store_upto(b, added + i, left);
  }
}

ALWAYS_INLINE int64_t seen_of(const ChunkAttentionArguments& a, int64_t row, int64_t chunk) {
  return std::min(a.size, a.positions[row] + 1 - chunk * a.size);
}

ALWAYS_INLINE void divide(const float* values, float sum, int64_t dim, float* out) {
  const Vec total = Vec::broadcast(sum);
  for (int64_t d = 0; d < dim; d += kLanes) store_upto(Vec::load(values + d) / total, out + d, dim - d);
}

#include "chunk_attention_group.h"
#include "chunk_attention_partial.h"

// Folds partials of neighbouring queries into their states.
void fold(const ChunkAttentionArguments& a, const ChunkAttentionState& partial, int64_t queries,
          const ChunkAttentionState& state) {
  const int64_t width = whole(a.dim);
  for (int64_t first = 0; first < queries; first += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, queries - first);
    float kept[kLanes], added[kLanes];
    merge(count, partial.max + first, partial.sum + first, state.max + first, state.sum + first, kept, added);
    for (int64_t i = 0; i < count; ++i) {
      const Vec keep = Vec::broadcast(kept[i]), add = Vec::broadcast(added[i]);
      const float* from = partial.values + (first + i) * width;
      float* to = state.values + (first + i) * width;
      for (int64_t d = 0; d < width; d += kLanes) fma(keep, Vec::load(to + d), add * Vec::load(from + d)).store(to + d);
    }
  }
}

// The result of a row whose states are complete.
void finish(const ChunkAttentionArguments& a, const ChunkAttentionState& states, int64_t row) {
  for (int64_t query = row * a.heads; query < (row + 1) * a.heads; ++query)
    divide(states.values + query * whole(a.dim), states.sum[query], a.dim, a.out + query * a.dim);
}

ChunkAttentionKernels run(bool bf16) {
  if (bf16) return {fold_group<uint16_t>, partial<uint16_t>, fold, finish};
  return {fold_group<float>, partial<float>, fold, finish};
}
