// What the 8-bit linear's two levels with 8 lanes in a register share: sixteen lanes are two registers, as in math.h.

struct Weights {
  __m256i low, high;
};
struct Value {
  __m256i v;
};
struct Integers {
  __m256i low, high;
  static Integers broadcast(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
  Vec floats() const { return {_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)}; }
};
ALWAYS_INLINE Weights load_quads(const char* at) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32))};
}
ALWAYS_INLINE Value load_value(const char* at) {
  int32_t value;
  std::memcpy(&value, at, sizeof value);
  return {_mm256_set1_epi32(value)};
}
