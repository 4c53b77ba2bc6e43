// Sixteen bf16 values to and from a Vec, for one instruction level: included by the bodies that levels.h compiles, as
// math.h is. A bf16 is the upper half of an fp32, so widening is exact; narrowing rounds to the nearest, ties to even.

#if SELFREWARD_LANES == 16

ALWAYS_INLINE Vec load_bf16(const uint16_t* at) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return {_mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xFFFF, _mm512_maskz_cvtepu16_epi32(0xFFFF, bits), 16))};
}

#elif SELFREWARD_LANES == 8

ALWAYS_INLINE __m256 widened(const uint16_t* at) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
ALWAYS_INLINE Vec load_bf16(const uint16_t* at) { return {widened(at), widened(at + 8)}; }

#else

ALWAYS_INLINE Vec load_bf16(const uint16_t* at) {
  uint32_t bits[kLanes];
  for (int i = 0; i < kLanes; ++i) bits[i] = uint32_t(at[i]) << 16;
  Vec x;
  std::memcpy(x.lane, bits, sizeof bits);
  return x;
}

#endif

ALWAYS_INLINE Vec load_bf16_part(const uint16_t* at, int count) {
  uint16_t part[kLanes] = {};
  std::memcpy(part, at, size_t(count) * sizeof *at);
  return load_bf16(part);
}

// Values of either storage type, widened.
ALWAYS_INLINE Vec load_wide(const float* at) { return Vec::load(at); }
ALWAYS_INLINE Vec load_wide(const uint16_t* at) { return load_bf16(at); }
ALWAYS_INLINE Vec load_wide_part(const float* at, int count) { return Vec::load_part(at, count); }
ALWAYS_INLINE Vec load_wide_part(const uint16_t* at, int count) { return load_bf16_part(at, count); }
