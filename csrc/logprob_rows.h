// One instruction level's logprob: included by levels.h.

constexpr int kChains = 4;
constexpr int64_t kSums = 1024;  // logits of one fp32 sum

ALWAYS_INLINE float largest(const float* x, int64_t count) {
  Vec most[kChains];
  for (Vec& lanes : most) lanes = Vec::broadcast(-INFINITY);
  int64_t i = 0;
  for (; count - i >= kChains * kLanes; i += kChains * kLanes)
    UNROLL for (int c = 0; c < kChains; ++c) most[c] = larger(Vec::load(x + i + c * kLanes), most[c]);
  float rest = max(larger(larger(most[0], most[1]), larger(most[2], most[3])));
  for (; i < count; ++i) rest = larger(x[i], rest);
  return rest;
}

// What is behind the last counts as exp(-inf) = 0.
ALWAYS_INLINE Vec load_or_lowest(const float* at, int64_t count) {
  if (count >= kLanes) return Vec::load(at);
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? at[i] : -INFINITY;
  return Vec::load(lanes);
}

ALWAYS_INLINE float shift_of(float most) { return std::fabs(most) < INFINITY ? most : 0.0f; }

// The sum of exp(x - shift).
ALWAYS_INLINE double total_of(const float* x, int64_t count, float shift) {
  const Vec base = Vec::broadcast(shift);
  double total = 0.0;
  for (int64_t block = 0; block < count; block += kSums) {
    const int64_t end = count - block < kSums ? count : block + kSums;
    Vec sums[kChains];
    for (Vec& lanes : sums) lanes = Vec::broadcast(0.0f);
    int64_t i = block;
    for (; end - i >= kChains * kLanes; i += kChains * kLanes)
      UNROLL for (int c = 0; c < kChains; ++c) sums[c] = sums[c] + exp(Vec::load(x + i + c * kLanes) - base);
    for (; i < end; i += kLanes) sums[0] = sums[0] + exp(load_or_lowest(x + i, end - i) - base);
    total += double(sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
  return total;
}

void fold(const LogprobArguments& a, int64_t row) {
  const float* x = a.logits + row * a.stride;
  const float here = largest(x, a.columns), most = larger(here, a.best[row]);
  const double mine = total_of(x, a.columns, shift_of(here)), before = a.total[row];
  const auto brought = [&](double total, float from) {
    return total == 0.0 ? 0.0 : total * std::exp(double(shift_of(from)) - double(shift_of(most)));
  };
  a.total[row] = brought(before, a.best[row]) + brought(mine, here);
  a.best[row] = most;
  const int64_t target = a.targets[row] - a.first;
  if (target >= 0 && target < a.columns) a.hit[row] = x[target];
}

void gradient(const LogprobArguments& a, int64_t row) {
  float* x = a.logits + row * a.stride;
  const Vec lse = Vec::broadcast(a.lse[row]), scale = Vec::broadcast(a.grad_lse[row] - a.grad_logp[row]);
  for (int64_t i = 0; i < a.columns; i += kLanes)
    store_upto(exp(load_upto(x + i, a.columns - i) - lse) * scale, x + i, a.columns - i);
  const int64_t target = a.targets[row] - a.first;
  if (target >= 0 && target < a.columns) x[target] += a.grad_logp[row];
}

void run(const LogprobArguments& a, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) a.grad_logp ? gradient(a, row) : fold(a, row);
}
