// Sums of the fp32 and bf16 linears, for linear_panels.h: a chain from zero for each 256 along the depth, chains added
// in ascending order, the first one as it is.

using Sum = Vec;

ALWAYS_INLINE Sum start(const LinearArguments&, int64_t, int64_t) { return Vec::broadcast(0.0f); }

ALWAYS_INLINE void finish(const LinearArguments&, int64_t, int64_t chain, const Sum& sum, float* total) {
  (chain ? Vec::load(total) + sum : sum).store(total);
}

ALWAYS_INLINE void write(const LinearArguments&, int64_t, const float* total, int64_t width, float* out) {
  std::memcpy(out, total, size_t(width) * sizeof(float));
}
