// Philox of sixteen counters at once, for one instruction level: the words of philox.h. Included by a body of levels.h.
// GCC vectorises a loop over philox() too, but in lanes of 64 bits: 4.1 ns a counter with AVX-512, here 1.5.

#if SELFREWARD_LANES == 16

struct Ints {
  __m512i v;
  static Ints broadcast(uint32_t x) { return {_mm512_set1_epi32(int(x))}; }
  static Ints load(const uint32_t* at) { return {_mm512_loadu_si512(at)}; }
  void store(uint32_t* at) const { _mm512_storeu_si512(at, v); }
};
ALWAYS_INLINE Ints operator^(Ints a, Ints b) { return {_mm512_xor_si512(a.v, b.v)}; }
// The 64 bits of a * b: even and odd lanes apart, then their halves back in place.
ALWAYS_INLINE void multiply(Ints a, Ints b, Ints& high, Ints& low) {
  const __m512i even = _mm512_maskz_mul_epu32(0xFF, a.v, b.v);  // maskz: see half_power
  const __m512i odd = _mm512_maskz_mul_epu32(0xFF, _mm512_maskz_srli_epi64(0xFF, a.v, 32), b.v);
  low = {_mm512_mask_blend_epi32(0xAAAA, even, _mm512_maskz_slli_epi64(0xFF, odd, 32))};
  high = {_mm512_mask_blend_epi32(0xAAAA, _mm512_maskz_srli_epi64(0xFF, even, 32), odd)};
}

#elif SELFREWARD_LANES == 8

struct Ints {
  __m256i v[2];
  static Ints broadcast(uint32_t x) { return {{_mm256_set1_epi32(int(x)), _mm256_set1_epi32(int(x))}}; }
  static Ints load(const uint32_t* at) {
    const auto* half = reinterpret_cast<const __m256i*>(at);
    return {{_mm256_loadu_si256(half), _mm256_loadu_si256(half + 1)}};
  }
  void store(uint32_t* at) const {
    auto* half = reinterpret_cast<__m256i*>(at);
    _mm256_storeu_si256(half, v[0]);
    _mm256_storeu_si256(half + 1, v[1]);
  }
};
ALWAYS_INLINE Ints operator^(Ints a, Ints b) {
  return {{_mm256_xor_si256(a.v[0], b.v[0]), _mm256_xor_si256(a.v[1], b.v[1])}};
}
ALWAYS_INLINE void multiply(Ints a, Ints b, Ints& high, Ints& low) {
  for (int i = 0; i < 2; ++i) {
    const __m256i even = _mm256_mul_epu32(a.v[i], b.v[i]);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v[i], 32), b.v[i]);
    low.v[i] = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    high.v[i] = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  }
}

#else

struct Ints {
  uint32_t lane[kLanes];
  static Ints broadcast(uint32_t x) {
    Ints y;
    for (uint32_t& lane : y.lane) lane = x;
    return y;
  }
  static Ints load(const uint32_t* at) {
    Ints y;
    std::memcpy(y.lane, at, sizeof y.lane);
    return y;
  }
  void store(uint32_t* at) const { std::memcpy(at, lane, sizeof lane); }
};
ALWAYS_INLINE Ints operator^(const Ints& a, const Ints& b) {
  Ints y;
  for (int l = 0; l < kLanes; ++l) y.lane[l] = a.lane[l] ^ b.lane[l];
  return y;
}
ALWAYS_INLINE void multiply(const Ints& a, const Ints& b, Ints& high, Ints& low) {
  for (int l = 0; l < kLanes; ++l) {
    const uint64_t product = uint64_t{a.lane[l]} * b.lane[l];
    high.lane[l] = uint32_t(product >> 32);
    low.lane[l] = uint32_t(product);
  }
}

#endif

// words[4 * l + j] is word j of the counter (position, candidate, blocks[l], 0).
ALWAYS_INLINE void philox_lanes(uint32_t position, uint32_t candidate, const uint32_t* blocks, uint64_t key,
                                uint32_t* words) {
  const Ints first = Ints::broadcast(0xD2511F53u), second = Ints::broadcast(0xCD9E8D57u);
  Ints c0 = Ints::broadcast(position), c1 = Ints::broadcast(candidate);
  Ints c2 = Ints::load(blocks), c3 = Ints::broadcast(0);
  uint32_t key0 = uint32_t(key), key1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    Ints high0, low0, high1, low1;
    multiply(c0, first, high0, low0);
    multiply(c2, second, high1, low1);
    c0 = high1 ^ c1 ^ Ints::broadcast(key0);
    c1 = low1;
    c2 = high0 ^ c3 ^ Ints::broadcast(key1);
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  uint32_t lanes[4][kLanes];
  c0.store(lanes[0]);
  c1.store(lanes[1]);
  c2.store(lanes[2]);
  c3.store(lanes[3]);
  for (int l = 0; l < kLanes; ++l)
    for (int j = 0; j < 4; ++j) words[4 * l + j] = lanes[j][l];
}
