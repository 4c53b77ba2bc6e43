// Sixteen lanes of fp32 and the functions over them, for one instruction level: levels.h includes this once per level,
// with SELFREWARD_LANES = 16 (AVX-512), 8 (AVX2 and FMA) or 1 (portable). A Vec is sixteen lanes at every level, every
// operation on a lane is one IEEE operation, and a reduction is one fixed tree, so the levels agree bit for bit.
// Only a NaN's payload may differ.

constexpr int kLanes = 16;

#if SELFREWARD_LANES == 16

struct Vec {
  __m512 v;
  static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* at) { return {_mm512_loadu_ps(at)}; }
  static Vec load_part(const float* at, int count) {  // the first `count` < 16, zeros behind; reads no further
    return {_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), at)};
  }
  void store(float* at) const { _mm512_storeu_ps(at, v); }
  void store_part(float* at, int count) const { _mm512_mask_storeu_ps(at, __mmask16((1u << count) - 1), v); }
};
ALWAYS_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
ALWAYS_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
ALWAYS_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
ALWAYS_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
ALWAYS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// a < b ? yes : no; a NaN is not less
ALWAYS_INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
// The integer in t's low bits, n, as 2^(n - 1).
ALWAYS_INLINE Vec half_power(Vec t) {
  // maskz: GCC 12 warns of the undefined register in the plain form
  const __m512i bits = _mm512_maskz_slli_epi32(0xFFFF, _mm512_castps_si512(t.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(0x3F000000)))};
}

#elif SELFREWARD_LANES == 8

struct Vec {
  __m256 low, high;
  static Vec broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Vec load(const float* at) { return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
  static __m256i mask(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vec load_part(const float* at, int count) {
    return {_mm256_maskload_ps(at, mask(count)), _mm256_maskload_ps(at + 8, mask(count - 8))};
  }
  void store(float* at) const {
    _mm256_storeu_ps(at, low);
    _mm256_storeu_ps(at + 8, high);
  }
  void store_part(float* at, int count) const {
    _mm256_maskstore_ps(at, mask(count), low);
    _mm256_maskstore_ps(at + 8, mask(count - 8), high);
  }
};
ALWAYS_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
ALWAYS_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
ALWAYS_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
ALWAYS_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
ALWAYS_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
ALWAYS_INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.low, yes.low, _mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.high, yes.high, _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ))};
}
ALWAYS_INLINE __m256 half_power(__m256 t) {
  const __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(0x3F000000)));
}
ALWAYS_INLINE Vec half_power(Vec t) { return {half_power(t.low), half_power(t.high)}; }

#else

struct Vec {
  float lane[kLanes];
  static Vec broadcast(float x) {
    Vec y;
    for (float& lane : y.lane) lane = x;
    return y;
  }
  static Vec load(const float* at) { return load_part(at, kLanes); }
  static Vec load_part(const float* at, int count) {  // the first `count`, zeros behind; reads no further
    Vec y = broadcast(0.0f);
    std::memcpy(y.lane, at, size_t(count) * sizeof(float));
    return y;
  }
  void store(float* at) const { store_part(at, kLanes); }
  void store_part(float* at, int count) const { std::memcpy(at, lane, size_t(count) * sizeof(float)); }
};
template <typename Lane>
ALWAYS_INLINE Vec each(Lane of) {
  Vec y;
  for (int i = 0; i < kLanes; ++i) y.lane[i] = of(i);
  return y;
}
ALWAYS_INLINE Vec operator+(const Vec& a, const Vec& b) {
  return each([&](int i) { return a.lane[i] + b.lane[i]; });
}
ALWAYS_INLINE Vec operator-(const Vec& a, const Vec& b) {
  return each([&](int i) { return a.lane[i] - b.lane[i]; });
}
ALWAYS_INLINE Vec operator*(const Vec& a, const Vec& b) {
  return each([&](int i) { return a.lane[i] * b.lane[i]; });
}
ALWAYS_INLINE Vec operator/(const Vec& a, const Vec& b) {
  return each([&](int i) { return a.lane[i] / b.lane[i]; });
}
ALWAYS_INLINE Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  return each([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
// a < b ? yes : no; a NaN is not less
ALWAYS_INLINE Vec where_less(const Vec& a, const Vec& b, const Vec& yes, const Vec& no) {
  return each([&](int i) { return a.lane[i] < b.lane[i] ? yes.lane[i] : no.lane[i]; });
}
// The integer in t's low bits, n, as 2^(n - 1).
ALWAYS_INLINE Vec half_power(const Vec& t) {
  return each([&](int i) {
    uint32_t bits;
    std::memcpy(&bits, &t.lane[i], sizeof bits);
    bits = (bits << 23) + 0x3F000000u;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return power;
  });
}

#endif

// The first min(count, 16) values, zeros behind.
ALWAYS_INLINE Vec load_upto(const float* at, int64_t count) {
  return count >= kLanes ? Vec::load(at) : Vec::load_part(at, int(count));
}

ALWAYS_INLINE void store_upto(Vec x, float* at, int64_t count) {
  if (count >= kLanes)
    x.store(at);
  else
    x.store_part(at, int(count));
}

// The larger; `kept` if they are equal or x is NaN, so that a maximum that starts at -inf never becomes NaN.
#if SELFREWARD_LANES == 16  // max_ps gives its second operand if they are equal or one is NaN
ALWAYS_INLINE Vec larger(Vec x, Vec kept) { return {_mm512_maskz_max_ps(0xFFFF, x.v, kept.v)}; }
#elif SELFREWARD_LANES == 8
ALWAYS_INLINE Vec larger(Vec x, Vec kept) { return {_mm256_max_ps(x.low, kept.low), _mm256_max_ps(x.high, kept.high)}; }
#else
ALWAYS_INLINE Vec larger(const Vec& x, const Vec& kept) { return where_less(kept, x, x, kept); }
#endif
ALWAYS_INLINE float larger(float x, float kept) { return kept < x ? x : kept; }

// A reduction combines lanes i and i + 8, then i and i + 4, i + 2, i + 1.
#if SELFREWARD_LANES == 1

template <typename Combine>
ALWAYS_INLINE float reduced(Vec x, Combine combine) {
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x.lane[i] = combine(x.lane[i + half], x.lane[i]);
  return x.lane[0];
}
ALWAYS_INLINE float sum(const Vec& x) {
  return reduced(x, [](float upper, float lower) { return lower + upper; });
}
ALWAYS_INLINE float max(const Vec& x) {
  return reduced(x, [](float upper, float lower) { return larger(upper, lower); });
}

#elif SELFREWARD_LANES == 16

// The lanes from the `half`-th on, as the first ones; half is 8, 4, 2 or 1.
template <int half>
ALWAYS_INLINE Vec upper(Vec x) {  // maskz: as above
  if (half == 8) return {_mm512_maskz_shuffle_f32x4(0xFFFF, x.v, x.v, 0xEE)};
  if (half == 4) return {_mm512_maskz_shuffle_f32x4(0xFFFF, x.v, x.v, 0x55)};
  return {_mm512_maskz_permute_ps(0xFFFF, x.v, half == 2 ? 0xEE : 0x55)};
}
ALWAYS_INLINE float sum(Vec x) {
  x = x + upper<8>(x);
  x = x + upper<4>(x);
  x = x + upper<2>(x);
  return _mm512_cvtss_f32((x + upper<1>(x)).v);
}
ALWAYS_INLINE float max(Vec x) {
  x = larger(upper<8>(x), x);
  x = larger(upper<4>(x), x);
  x = larger(upper<2>(x), x);
  return _mm512_cvtss_f32(larger(upper<1>(x), x).v);
}

#else

ALWAYS_INLINE float sum(Vec x) {
  const __m256 a = _mm256_add_ps(x.low, x.high);
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
ALWAYS_INLINE float max(Vec x) {
  const __m256 a = _mm256_max_ps(x.high, x.low);
  const __m128 b = _mm_max_ps(_mm256_extractf128_ps(a, 1), _mm256_castps256_ps128(a));
  const __m128 c = _mm_max_ps(_mm_movehl_ps(b, b), b);
  return _mm_cvtss_f32(_mm_max_ss(_mm_shuffle_ps(c, c, 1), c));
}

#endif

// e^x: 2^n times a polynomial in r = x - n ln 2, |r| <= ln 2 / 2, ln 2 in two parts. The error is at most 1.01
// units in the last place. 0 below -86 (the value there is under 4.5e-38, so that no result is denormal and none
// depends on the thread's flush-to-zero mode), infinite above log of the largest fp32; NaN stays.
ALWAYS_INLINE Vec exp(Vec x) {
  const Vec round = Vec::broadcast(0x1.8p23f);  // a sum with it is an integer in the low bits
  const Vec t = fma(x, Vec::broadcast(1.44269504f), round);
  const Vec n = t - round;
  const Vec r = fma(n, Vec::broadcast(2.12194440e-4f), fma(n, Vec::broadcast(-0.693359375f), x));
  Vec p = Vec::broadcast(1.9875691500e-4f);
  p = fma(p, r, Vec::broadcast(1.3981999507e-3f));
  p = fma(p, r, Vec::broadcast(8.3334519073e-3f));
  p = fma(p, r, Vec::broadcast(4.1665795894e-2f));
  p = fma(p, r, Vec::broadcast(1.6666665459e-1f));
  p = fma(p, r, Vec::broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r) + Vec::broadcast(1.0f);
  const Vec y = p * half_power(t) * Vec::broadcast(2.0f);  // in two steps: 2^128 is no fp32
  const Vec high = Vec::broadcast(88.75f);
  return where_less(x, Vec::broadcast(-86.0f), Vec::broadcast(0.0f), where_less(high, x, Vec::broadcast(INFINITY), y));
}
