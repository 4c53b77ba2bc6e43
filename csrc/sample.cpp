// Draws a token per row of logits without sorting the vocabulary and with noise only for tokens that can win.
//
// Passes over a row: the maximum (and whether there is a NaN); the fp32 weights e^y and their sum in a fixed order; the
// cut, if anything is cut off; the draw. Rows are shared out to threads in runs; a row's bits depend on nothing but it.
//
// The cut is a place in the order of tokens (larger logit, then lower id). Its masses are double precision. Top-k looks
// only at tokens that reach the k-th largest of the maxima of groups of 16. Top-p guesses from the fp32 weights, added
// up in buckets by logit, between which two logits the nucleus ends; then one pass in double precision gives the total,
// the mass above them and the tokens between them, some hundred, and tells whether the guess is right: if not, all
// tokens are looked at. Buckets of those tokens tell where the target is reached; the tokens of that bucket alone are
// sorted. All equal: one bucket, still right. Min-p is a logit, found by halving.
//
// The draw is the argmax of y + noise in double precision, as the reference computes it. E = -log(1 - u) >= u, so a
// token of weight w beats the best total t only if w >= u e^t: a compare per word, from the likeliest token's total on;
// the two logs of the noise follow for the few that pass. Groups of 16 tokens too light for any word get no words.
//
// Microseconds of one thread for a row of 32,000, 64 rows, an AMD EPYC (Zen 5, AVX-512); beside it torch 2.13 (two
// log_softmax, a sort where something is cut off, all the noise). `peaked`: 50 likely tokens over a normal bulk, as a
// trained model has it; `flat`: normal with deviation 0.6. One row alone takes about 20 more: the call from Python.
//
//                         peaked        flat          torch
//   temperature 1             28          29      450 to 510
//   0.7, top-p 0.9            56          74   2,960 to 3,020
//   top-k 50                  31          32   2,910 to 3,170
//   greedy                    10          11      230 to 400
//
// Top-p without the guess, every token heavy enough to be needed in the buckets: 81 and 163. Slower in the guess: a
// loop over the heavy lanes only (85), light tokens all in the last bucket, where each addition waits for the one
// before it (95 and 73). Rejected: fp32 masses wherever a bound of their error makes the cut certain. The bound is
// about 1e-6 of the mass and a token at the end of a flat nucleus weighs 1e-5, so one row in five would go the exact
// way after all, and with a top-p near 1 every row.

#include "sample.h"

#include <algorithm>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "noise.h"
#include "philox.h"
#include "runs.h"

namespace selfreward {
namespace {

// Tokens in the order of likelihood, larger logit first, then lower id: kept are those up to and with this one.
struct Cut {
  float x = -INFINITY;
  int32_t id = INT32_MAX;
  void tighten(const Cut& other) {
    if (other.x > x || (other.x == x && other.id < id)) *this = other;
  }
};

// The tokens that a truncation looks at, ascending.
struct Tokens {
  const int32_t* ids;
  const double* mass;  // null: each has mass 1
  int64_t count;
  double mass_of(int64_t i) const { return mass ? mass[i] : 1.0; }
};

// Keeps a token if those before it weigh less than `target`. The masses are added up in buckets of equal logit range;
// only the bucket in which the target is reached is put in order. `order`: room for `count` places.
Cut cut_at(const float* x, const Tokens& tokens, double target, int32_t* order) {
  constexpr int kBuckets = 1024;
  double high = x[tokens.ids[0]], low = high;
  for (int64_t i = 1; i < tokens.count; ++i) {
    high = std::max<double>(high, x[tokens.ids[i]]);
    low = std::min<double>(low, x[tokens.ids[i]]);
  }
  const double scale = high > low ? (kBuckets - 1) / (high - low) : 0.0;
  const auto bucket_of = [&](float logit) { return int((high - logit) * scale); };
  double buckets[kBuckets] = {};
  for (int64_t i = 0; i < tokens.count; ++i) buckets[bucket_of(x[tokens.ids[i]])] += tokens.mass_of(i);

  const int last = bucket_of(float(low));
  int bucket = 0;
  double before = 0.0;
  while (bucket < last && before + buckets[bucket] < target) before += buckets[bucket++];
  int64_t members = 0;
  for (int64_t i = 0; i < tokens.count; ++i)
    if (bucket_of(x[tokens.ids[i]]) == bucket) order[members++] = int32_t(i);
  std::sort(order, order + members, [&](int32_t a, int32_t b) {
    const float left = x[tokens.ids[a]], right = x[tokens.ids[b]];
    return left > right || (left == right && a < b);
  });
  int64_t kept = 0;
  do before += tokens.mass_of(order[kept++]);
  while (kept < members && before < target);
  const int32_t id = tokens.ids[order[kept - 1]];
  return {x[id], id};
}

// The smallest logit whose y = (x - top) / temperature reaches `least` <= 0: y never falls as x rises, so by halving
// the range of floats, counted in order.
float lowest_logit(double top, double temperature, double least) {
  const auto value_of = [](int64_t place) {
    const int32_t bits = place < 0 ? int32_t(place) ^ INT32_MAX : int32_t(place);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  const auto place_of = [](float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return int64_t{bits < 0 ? bits ^ INT32_MAX : bits};
  };
  int64_t below = place_of(-INFINITY), reached = place_of(float(top));
  while (reached - below > 1) {
    const int64_t middle = below + (reached - below) / 2;
    ((double(value_of(middle)) - top) / temperature >= least ? reached : below) = middle;
  }
  return value_of(reached);
}

float kth_largest(float* values, int64_t count, int64_t k) {
  std::nth_element(values, values + k - 1, values + count, [](float a, float b) { return a > b; });
  return values[k - 1];
}

// For plain_exp: e^-700 = 1e-304 is nothing beside the largest weight, 1.
ALWAYS_INLINE double not_below(double y) { return y < -700.0 ? -700.0 : y; }

ALWAYS_INLINE int lowest_bit(uint32_t bits) {  // of bits != 0
#ifdef __GNUC__
  return __builtin_ctz(bits);
#else
  int place = 0;
  while (!(bits >> place & 1)) ++place;
  return place;
#endif
}

// The exact value that a draw maximises.
ALWAYS_INLINE double total_of(double x, double top, double temperature, uint32_t word) {
  return (x - top) / temperature + double(gumbel_of_word(word));
}

}  // namespace
}  // namespace selfreward

#define SELFREWARD_BODY "sample_rows.h"
#include "levels.h"

namespace selfreward {

Level<SampleRows> sample_level(int index) { return level_at(index); }

void sample(const SampleArguments& a, int threads, SampleRows rows) {
  const Runs runs(a.rows, 32 * a.width, threads);
  const int64_t room = (a.width + 15) / 16 * 16, each = 3 * room;  // in doubles
  static_assert(sizeof(double) == 2 * sizeof(float) && sizeof(float) == sizeof(int32_t), "the layout below");
  // A place for every thread, taken for a run: more would push each other out of the cache.
  const int64_t places = std::min<int64_t>(threads, runs.count);
  const std::unique_ptr<double[]> memory(new double[size_t(places * each)]);
  std::vector<std::atomic_flag> taken(static_cast<size_t>(places));
  for (auto& flag : taken) flag.clear();
  parallel_runs(runs, threads, [&](int64_t, int64_t first, int64_t last) {
    int64_t place = 0;
    while (taken[size_t(place)].test_and_set(std::memory_order_acquire)) place = (place + 1) % places;
    double* mass = memory.get() + place * each;
    float* allowed = reinterpret_cast<float*>(mass + room);
    int32_t* ids = reinterpret_cast<int32_t*>(mass + 2 * room);
    rows(a, {mass, allowed, allowed + room, ids, ids + room}, first, last);
    taken[size_t(place)].clear(std::memory_order_release);
  });
}

}  // namespace selfreward
