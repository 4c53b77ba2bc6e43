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

void log_prob(const LogprobArguments& a, int64_t row) {
  const float* x = a.logits + row * a.stride;
  const float most = largest(x, a.vocab), shift = std::fabs(most) < INFINITY ? most : 0.0f;
  const Vec base = Vec::broadcast(shift);
  double total = 0.0;
  for (int64_t block = 0; block < a.vocab; block += kSums) {
    const int64_t end = a.vocab - block < kSums ? a.vocab : block + kSums;
    Vec sums[kChains];
    for (Vec& lanes : sums) lanes = Vec::broadcast(0.0f);
    int64_t i = block;
    for (; end - i >= kChains * kLanes; i += kChains * kLanes)
      UNROLL for (int c = 0; c < kChains; ++c) sums[c] = sums[c] + exp(Vec::load(x + i + c * kLanes) - base);
    for (; i < end; i += kLanes) sums[0] = sums[0] + exp(load_or_lowest(x + i, end - i) - base);
    total += double(sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
  a.lse[row] = float(double(shift) + std::log(total));
  a.logp[row] = x[a.targets[row]] - a.lse[row];
}

void gradient(const LogprobArguments& a, int64_t row) {
  float* x = a.logits + row * a.stride;
  const Vec lse = Vec::broadcast(a.lse[row]), scale = Vec::broadcast(a.grad_lse[row] - a.grad_logp[row]);
  for (int64_t i = 0; i < a.vocab; i += kLanes)
    store_upto(exp(load_upto(x + i, a.vocab - i) - lse) * scale, x + i, a.vocab - i);
  x[a.targets[row]] += a.grad_logp[row];
}

void run(const LogprobArguments& a, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) a.grad_logp ? gradient(a, row) : log_prob(a, row);
}
