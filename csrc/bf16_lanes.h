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
template <typename T>
ALWAYS_INLINE Vec load_wide_upto(const T* at, int64_t count) {
  return count >= kLanes ? load_wide(at) : load_wide_part(at, int(count));
}

// To the nearest, ties to even; a NaN becomes the quiet one of its sign.
ALWAYS_INLINE uint16_t narrowed(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return uint16_t(bits >> 16 | 0x40u);
  return uint16_t((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

#if SELFREWARD_LANES == 16

ALWAYS_INLINE void store_bf16(Vec x, uint16_t* at) {
  const __mmask16 all = 0xFFFF;
  const __m512i bits = _mm512_castps_si512(x.v), high = _mm512_maskz_srli_epi32(all, bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __m512i number = _mm512_maskz_srli_epi32(all, rounded, 16),
                nan = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  const __m512i picked = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), number, nan);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_maskz_cvtepi32_epi16(all, picked));
}

#else

ALWAYS_INLINE void store_bf16(Vec x, uint16_t* at) {
  float lane[kLanes];
  x.store(lane);
  for (int i = 0; i < kLanes; ++i) at[i] = narrowed(lane[i]);
}

#endif

// The first min(count, 16) values, as they are or rounded.
ALWAYS_INLINE void store_narrow_upto(Vec x, float* at, int64_t count) { store_upto(x, at, count); }
ALWAYS_INLINE void store_narrow_upto(Vec x, uint16_t* at, int64_t count) {
  if (count >= kLanes) return store_bf16(x, at);
  uint16_t part[kLanes];
  store_bf16(x, part);
  std::memcpy(at, part, size_t(count) * sizeof *at);
}
