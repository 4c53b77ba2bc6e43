// One instruction level's sample: included by levels.h. `x` [count] are the logits of the tokens that may be drawn.

// Which lanes of a are at least b: lane l in bit l.
#if SELFREWARD_LANES == 16
ALWAYS_INLINE uint32_t reaching(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
#elif SELFREWARD_LANES == 8
ALWAYS_INLINE uint32_t reaching(Vec a, Vec b) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ))) |
         uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ))) << 8;
}
#else
ALWAYS_INLINE uint32_t reaching(const Vec& a, const Vec& b) {
  uint32_t lanes = 0;
  for (int l = 0; l < kLanes; ++l) lanes |= uint32_t(a.lane[l] >= b.lane[l]) << l;
  return lanes;
}
#endif

#include "philox_lanes.h"

constexpr int kFold = 64;  // vectors that a lane adds up in fp32 before its sum goes on in double precision
constexpr float kLowest = -3.4028234663852886e38f;
constexpr int kGroups = 16;  // groups of 16 tokens, four Philox blocks each, whose words are made at once

// 16 logits, -inf behind the end.
ALWAYS_INLINE Vec logits_at(const float* x, int64_t i, int64_t count) {
  if (count - i >= kLanes) return Vec::load(x + i);
  float lane[kLanes];
  for (int l = 0; l < kLanes; ++l) lane[l] = i + l < count ? x[i + l] : -INFINITY;
  return Vec::load(lane);
}

// The largest logit; +inf if one is NaN.
ALWAYS_INLINE float largest(const float* x, int64_t count) {
  const Vec zero = Vec::broadcast(0.0f), infinite = Vec::broadcast(INFINITY);
  Vec top = Vec::broadcast(-INFINITY), bad = zero;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec part = logits_at(x, i, count);
    top = larger(part, top);
    bad = bad + where_less(part, infinite, zero, infinite);
  }
  return larger(max(bad) > 0.0f ? INFINITY : -INFINITY, max(top));
}

// The sum of e^((x - top) / temperature), and the summands in `weight` where that is not null: lane l of 16 adds the
// tokens l, l + 16, ... in fp32 over 64 vectors, then the lanes, then the blocks in double precision.
template <bool kStore, bool kCool>
ALWAYS_INLINE double weigh(const float* x, int64_t count, float top, float temperature, float* weight) {
  const Vec highest = Vec::broadcast(top), divisor = Vec::broadcast(temperature);
  double total = 0.0;
  for (int64_t start = 0; start < count; start += kFold * kLanes) {
    const int64_t end = std::min<int64_t>(count, start + kFold * kLanes);
    Vec lanes = Vec::broadcast(0.0f);
    for (int64_t i = start; i < end; i += kLanes) {
      Vec y = logits_at(x, i, count) - highest;
      if (kCool) y = y / divisor;
      const Vec part = exp(y);
      if (kStore) part.store(weight + i);
      lanes = lanes + part;
    }
    total += double(sum(lanes));
  }
  return total;
}

// The ids whose value is at least `least`, which is above -inf, ascending; their number.
ALWAYS_INLINE int64_t collect(const float* values, int64_t count, float least, int32_t* ids) {
  const Vec bound = Vec::broadcast(least);
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kLanes)
    for (uint32_t lanes = reaching(logits_at(values, i, count), bound); lanes; lanes &= lanes - 1)
      ids[found++] = int32_t(i + lowest_bit(lanes));
  return found;
}

// The lowest id whose logit is the largest one, `top`.
ALWAYS_INLINE int64_t likeliest(const float* x, int64_t count, float top) {
  for (int64_t i = 0;; i += kLanes)
    if (const uint32_t lanes = reaching(logits_at(x, i, count), Vec::broadcast(top))) return i + lowest_bit(lanes);
}

// A logit that at least k tokens reach: the k-th largest of the maxima of groups of 16. The smallest finite one if
// there are fewer groups. `maxima`: room for count values.
ALWAYS_INLINE float reached_by(const float* x, int64_t count, int64_t k, float* maxima) {
  int64_t groups = 0;
  for (int64_t start = 0; start < count; start += kLanes * kLanes) {
    const int64_t end = std::min<int64_t>(count, start + kLanes * kLanes);
    Vec top = Vec::broadcast(-INFINITY);
    for (int64_t i = start; i < end; i += kLanes) top = larger(logits_at(x, i, count), top);
    const int64_t full = std::min<int64_t>(kLanes, end - start);  // lanes that hold a token
    store_upto(top, maxima + groups, full);
    groups += full;
  }
  return groups < k ? kLowest : larger(kth_largest(maxima, groups, k), kLowest);
}

struct Row {
  const float* x;  // [count]
  int64_t count;
  float top, temperature;
  int64_t top_k;
  double top_p, min_p;
  uint64_t seed;
  uint32_t position, candidate;
};

// Two logits between which a nucleus ends.
struct Bracket {
  float high, low;
};

// Where the nucleus likely ends, from fp32 weights added up in buckets of equal logit range. Right or wrong, it changes
// no result by more than a rounding in double precision.
ALWAYS_INLINE Bracket likely_bracket(const Row& row, const float* weight, double weight_sum) {
  constexpr int kBuckets = 1024;
  // All tokens with less than this hold less than 1 - top_p together: none of them is needed.
  const double least = (1.0 - row.top_p) * weight_sum / double(row.count) * 0.999;
  const float width = larger(float(-plain_log(least) * row.temperature / kBuckets), 1e-30f);
  const Vec top = Vec::broadcast(row.top), scale = Vec::broadcast(1.0f / width), bound = Vec::broadcast(float(least));
  const Vec last = Vec::broadcast(kBuckets - 1);
  const Vec round = Vec::broadcast(0x1p23f);  // a sum with it is an integer in the low bits
  float spill[kLanes];  // places of lighter tokens, one for every lane: additions to the same one wait for each other
  for (int l = 0; l < kLanes; ++l) spill[l] = float(kBuckets + l);
  const Vec behind = Vec::load(spill);
  double buckets[kBuckets + kLanes] = {};
  for (int64_t i = 0; i < row.count; i += kLanes) {
    if (!reaching(Vec::load(weight + i), bound)) continue;
    const Vec place = (top - logits_at(row.x, i, row.count)) * scale;
    float lane[kLanes];
    (where_less(place, last, place, behind) + round).store(lane);
    uint32_t bucket[kLanes];
    std::memcpy(bucket, lane, sizeof bucket);
    for (int l = 0; l < kLanes; ++l) buckets[bucket[l] & 0x7FFFFF] += double(weight[i + l]);
  }
  int at = 0;
  for (double before = 0.0; at < kBuckets - 1; before += buckets[at++])
    if (before + buckets[at] >= row.top_p * weight_sum) break;
  // The bucket and half of its neighbours.
  return {at > 0 ? row.top - float(at - 1) * width : row.top,
          at < kBuckets - 1 ? larger(row.top - float(at + 1) * width, kLowest) : kLowest};
}

struct Masses {
  double total, above;  // above: of the tokens likelier than all of the bracket
  int64_t count;        // of the bracket's tokens, in ids and mass of the scratch
  double inside;
};

// Masses in double precision, for a top-p that must find the right token: 16 lanes, then a tree. Also fills
// scratch.weight. In loops over a block, which vectorise and do not wait for one another.
ALWAYS_INLINE Masses weigh_exactly(const Row& row, const Bracket& bracket, const SampleScratch& scratch) {
  constexpr int kBlock = 256;
  const double inverse = 1.0 / row.temperature, top = row.top;
  const Vec high = Vec::broadcast(bracket.high), low = Vec::broadcast(bracket.low);
  double total[kLanes] = {}, above[kLanes] = {}, inside = 0.0;
  int64_t count = 0;
  for (int64_t start = 0; start < row.count; start += kBlock) {
    float logit[kBlock];
    double part[kBlock];
    const int size = int(std::min<int64_t>(kBlock, (row.count - start + kLanes - 1) / kLanes * kLanes));
    for (int i = 0; i < size; i += kLanes) logits_at(row.x, start + i, row.count).store(logit + i);
    for (int i = 0; i < size; ++i) part[i] = not_below((double(logit[i]) - top) * inverse);
    for (int i = 0; i < size; ++i) part[i] = plain_exp(part[i]);
    for (int i = 0; i < size; ++i) scratch.weight[start + i] = float(part[i]);
    for (int i = 0; i < size; i += kLanes)
      for (int l = 0; l < kLanes; ++l) total[l] += part[i + l];
    for (int i = 0; i < size; i += kLanes)
      for (int l = 0; l < kLanes; ++l) above[l] += logit[i + l] > bracket.high ? part[i + l] : 0.0;
    for (int i = 0; i < size; i += kLanes) {
      const Vec x = Vec::load(logit + i);
      for (uint32_t lanes = reaching(x, low) & reaching(high, x); lanes; lanes &= lanes - 1) {
        const int l = i + lowest_bit(lanes);
        scratch.ids[count] = int32_t(start + l);
        scratch.mass[count++] = part[l];
        inside += part[l];
      }
    }
  }
  for (int half = kLanes / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) total[l] += total[l + half], above[l] += above[l + half];
  return {total[0], above[0], count, inside};
}

// The last token of the smallest set of likeliest tokens whose mass reaches top_p.
ALWAYS_INLINE Cut nucleus_cut(const Row& row, const SampleScratch& scratch, double weight_sum) {
  Masses masses = weigh_exactly(row, likely_bracket(row, scratch.weight, weight_sum), scratch);
  double target = row.top_p * masses.total;
  if (masses.above >= target || masses.above + masses.inside < target) {  // it ends elsewhere
    masses = weigh_exactly(row, {row.top, kLowest}, scratch);
    target = row.top_p * masses.total;
  }
  return cut_at(row.x, {scratch.ids, scratch.mass, masses.count}, target - masses.above, scratch.order);
}

// Fills scratch.weight and returns the sum of what is kept. `weight_sum`: that of scratch.weight if it is there
// already, else negative.
ALWAYS_INLINE double truncate(const Row& row, const SampleScratch& scratch, double weight_sum) {
  const bool by_p = row.top_p < 1.0, by_k = row.top_k > 0 && row.top_k < row.count;
  if (weight_sum < 0.0 && row.temperature == 1.0f)
    weight_sum = weigh<true, false>(row.x, row.count, row.top, 1.0f, scratch.weight);
  else if (weight_sum < 0.0)
    weight_sum = weigh<true, true>(row.x, row.count, row.top, row.temperature, scratch.weight);

  Cut cut;
  Tokens tokens{scratch.ids, nullptr, 0};
  if (by_k) {
    // `mass` is free until the tokens are known.
    const float least = reached_by(row.x, row.count, row.top_k, reinterpret_cast<float*>(scratch.mass));
    tokens.count = collect(row.x, row.count, least, scratch.ids);
    cut.tighten({least, INT32_MAX});
    if (tokens.count > row.top_k) cut.tighten(cut_at(row.x, tokens, double(row.top_k), scratch.order));
  }
  if (by_p && by_k) {
    double total = 0.0;
    int64_t kept = 0;
    for (int64_t i = 0; i < tokens.count; ++i) {
      const int32_t id = scratch.ids[i];
      if (row.x[id] < cut.x || (row.x[id] == cut.x && id > cut.id)) continue;
      scratch.ids[kept] = id;
      scratch.mass[kept] = plain_exp(not_below((double(row.x[id]) - row.top) / row.temperature));
      total += scratch.mass[kept++];
    }
    cut.tighten(cut_at(row.x, {scratch.ids, scratch.mass, kept}, row.top_p * total, scratch.order));
  } else if (by_p) {
    cut.tighten(nucleus_cut(row, scratch, weight_sum));
  }
  if (row.min_p > 0.0)
    cut.tighten(
        {lowest_logit(row.top, row.temperature, plain_log(row.min_p < 1e-300 ? 1e-300 : row.min_p)), INT32_MAX});

  float* weight = scratch.weight;
  const int64_t end = (row.count + kLanes - 1) / kLanes * kLanes;
  if (cut.x > -INFINITY) {
    const Vec edge = Vec::broadcast(cut.x), none = Vec::broadcast(-1.0f), zero = Vec::broadcast(0.0f);
    weight_sum = 0.0;
    for (int64_t start = 0; start < row.count; start += kFold * kLanes) {
      Vec lanes = zero;
      for (int64_t i = start; i < std::min(row.count, start + kFold * kLanes); i += kLanes) {
        const Vec x = logits_at(row.x, i, row.count), all = Vec::load(weight + i);
        // Of the tokens at the edge, all up to its id.
        Vec part = i + kLanes - 1 <= cut.id ? where_less(x, edge, none, all) : where_less(edge, x, all, none);
        if (i <= cut.id && cut.id < i + kLanes - 1) {
          float lane[kLanes];
          part.store(lane);
          for (int64_t l = 0; i + l <= cut.id; ++l)
            if (row.x[i + l] == cut.x) lane[l] = weight[i + l];
          part = Vec::load(lane);
        }
        part.store(weight + i);
        lanes = lanes + larger(part, zero);
      }
      weight_sum += double(sum(lanes));
    }
  }
  for (int64_t i = row.count; i < end; ++i) weight[i] = -1.0f;
  return weight_sum;
}

// The best token so far, and what a weight must reach to beat it.
struct Best {
  int64_t id;
  double total;
  float per_word;  // times half the word
  float least;     // whatever the word
  void take(int64_t token, double value) {
    id = token;
    total = value;
    const double scale = plain_exp(value) * (1.0 - 1e-4);  // far more than the error of a weight in fp32
    per_word = float(scale * 0x1p-31);
    least = float(scale * 0x1p-33);
  }
};

// argmax of y + noise over the tokens whose weight is not negative. A token with weight w beats a total t only if
// w / E >= e^t, and E >= u: noise is worked out only where w >= u e^t, and words only where that can be.
ALWAYS_INLINE int64_t draw(const Row& row, const float* weight, int64_t first) {
  const Words word =
      philox({{row.position, row.candidate, uint32_t(first / 4), 0}}, uint32_t(row.seed), uint32_t(row.seed >> 32));
  Best best;
  best.take(first, total_of(row.x[first], row.top, row.temperature, word.w[first % 4]));

  int64_t starts[kGroups] = {};
  uint32_t blocks[4 * kGroups], words[kLanes * kGroups];
  float halves[kLanes * kGroups];
  int groups = 0;
  for (int64_t start = 0; start < row.count; start += kLanes) {
    if (reaching(Vec::load(weight + start), Vec::broadcast(best.least))) starts[groups++] = start;
    if (groups < kGroups && start + kLanes < row.count) continue;
    for (int i = 0; i < 4 * kGroups; ++i) blocks[i] = uint32_t(starts[i / 4] / 4) + uint32_t(i % 4);
    for (int i = 0; i < 4 * kGroups; i += kLanes)
      philox_lanes(row.position, row.candidate, blocks + i, row.seed, words + 4 * i);
    for (int i = 0; i < kLanes * kGroups; ++i) halves[i] = float(int32_t(words[i] >> 1));
    for (int group = 0; group < groups; ++group) {
      const Vec own = Vec::load(weight + starts[group]), half = Vec::load(halves + kLanes * group);
      for (uint32_t lanes = reaching(own, half * Vec::broadcast(best.per_word)); lanes; lanes &= lanes - 1) {
        const int l = lowest_bit(lanes);
        const int64_t id = starts[group] + l;
        if (weight[id] < halves[kLanes * group + l] * best.per_word) continue;  // the best may have risen
        const double total = total_of(row.x[id], row.top, row.temperature, words[kLanes * group + l]);
        if (total > best.total || (total == best.total && id < best.id)) best.take(id, total);
      }
    }
    groups = 0;
  }
  return best.id;
}

ALWAYS_INLINE void sample_row(const SampleArguments& a, const SampleScratch& scratch, int64_t number) {
  const float* logits = a.logits + number * a.width;
  const float all_top = largest(logits, a.width);
  Row row{logits,
          a.vocab,
          all_top,
          a.temperature[number],
          a.top_k[number],
          a.top_p[number],
          a.min_p[number],
          uint64_t(a.seeds[number]),
          uint32_t(a.positions[number]),
          uint32_t(a.candidates[number])};
  const int64_t* forbidden = a.forbidden + a.forbidden_offsets[number];
  const int64_t* forbidden_end = a.forbidden + a.forbidden_offsets[number + 1];
  const bool whole = forbidden == forbidden_end && a.vocab == a.width;
  if (forbidden != forbidden_end) {
    std::memcpy(scratch.allowed, logits, size_t(a.vocab) * sizeof(float));
    for (; forbidden != forbidden_end; ++forbidden)
      if (*forbidden < a.vocab) scratch.allowed[*forbidden] = -INFINITY;
    row.x = scratch.allowed;
  }
  if (!whole) row.top = largest(row.x, row.count);

  const int64_t labels = a.label_offsets[number], labels_end = a.label_offsets[number + 1];
  if (all_top == INFINITY || row.top == -INFINITY) {  // no distribution
    a.ids[number] = 0;
    a.raw[number] = a.sampled[number] = NAN;
    for (int64_t i = labels; i < labels_end; ++i) a.labels[i] = NAN;
    return;
  }
  double weight_sum = -1.0, all_sum;
  if (whole && row.temperature == 1.0f)
    weight_sum = all_sum = weigh<true, false>(logits, a.width, all_top, 1.0f, scratch.weight);
  else
    all_sum = weigh<false, false>(logits, a.width, all_top, 1.0f, nullptr);
  const double log_sum = plain_log(all_sum);
  const auto raw = [&](int64_t id) { return float((double(logits[id]) - all_top) - log_sum); };
  for (int64_t i = labels; i < labels_end; ++i) a.labels[i] = raw(a.label_ids[i]);

  int64_t id = likeliest(row.x, row.count, row.top);
  float sampled = 0.0f;
  if (row.temperature != 0.0f) {
    weight_sum = truncate(row, scratch, weight_sum);
    id = draw(row, scratch.weight, id);
    sampled = float((double(row.x[id]) - row.top) / row.temperature - plain_log(weight_sum));
  }
  a.ids[number] = id;
  a.raw[number] = raw(id);
  a.sampled[number] = sampled;
}

void run(const SampleArguments& a, const SampleScratch& scratch, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) sample_row(a, scratch, row);
}
