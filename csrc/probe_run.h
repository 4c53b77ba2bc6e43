// One instruction level's probe: included by levels.h.

float run(const ProbeArguments& a) {
  constexpr int kChains = kProbeChains;
  Vec sums[kChains];
  UNROLL for (int c = 0; c < kChains; ++c) sums[c] = Vec::broadcast(float(c));
  if (a.memory) {
    constexpr int kRead = 8;
    for (int64_t i = 0; i + kRead * kLanes <= a.count; i += kRead * kLanes)
      UNROLL for (int c = 0; c < kRead; ++c) sums[c] = sums[c] + Vec::load(a.memory + i + c * kLanes);
  } else {
    const Vec factor = Vec::broadcast(0.999f), addend = Vec::broadcast(0.001f);
    for (int64_t i = 0; i < a.count; ++i)
      UNROLL for (int c = 0; c < kChains; ++c) sums[c] = fma(sums[c], factor, addend);
  }
  Vec total = sums[0];
  UNROLL for (int c = 1; c < kChains; ++c) total = total + sums[c];
  return sum(total);
}
