// The sampler's fp32 linear over packed panels of 64 outputs. The order of the sums is the contract: within each block
// of 256 along the depth one ascending FMA chain from zero, block sums added in ascending order. Vector lanes run over
// outputs and the depth is never split over accumulators or threads, so a row's bits depend neither on the other rows
// nor on the instruction level nor on the threads.
//
// Loop order: rows in sections of kRows, then panels (shared out to the threads), then blocks of 256 along the depth,
// then groups of up to 6 rows: a block of a panel is 64 KB, so it stays in the second-level cache while all groups
// pass, and is read from memory once per section. A group keeps 6 rows x 64 outputs in registers (AVX-512: 24 of 32);
// its totals wait in a buffer of the panel between blocks. With few rows the weights' stream bounds the time: every
// group fetches its share of the next block while it computes.
//
// AMD EPYC (Zen 5: family 26, model 2; virtual, 2 cores), depth 768, 32,000 outputs, weights not in cache, one thread;
// torch 2.13's F.linear beside it; FMA peak of one core in the same minute 287 GFLOP/s:
//
//   rows                         1     4    32   128   512
//   AVX-512, GFLOP/s            23    81   265   263   255     1 and 4 rows: 46 and 41 GB/s of weights
//     share of the FMA peak      -   .28   .92   .92   .89
//   AVX2, GFLOP/s               22     -   106   123     -
//   torch, GFLOP/s               9    26    81   106   103
//
// Portable code runs at 1.5. Two threads, both cores idle, 128 rows: 525 (one: 268). Slower variants: only the first
// group fetches (32 rows: 202), fetching into the second-level cache only (12 rows: 151, not 195).

#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "compiler.h"
#include "threads.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SELFREWARD_X86 1
#include <immintrin.h>
#endif

namespace selfreward {
namespace {

constexpr int64_t kBlock = 256;  // along the depth: part of the numbers
constexpr int64_t kGroup = 6;    // rows of a tile at most
constexpr int64_t kRows = 252;   // rows of a section: their totals are 64 KB
constexpr int kLine = 16;        // floats in a cache line

namespace portable {

constexpr int kLanes = 16, kRegisters = 8;

struct Vec {
  float lane[kLanes];
  static Vec zero() { return broadcast(0.0f); }
  static Vec broadcast(float value) {
    Vec v;
    for (float& lane : v.lane) lane = value;
    return v;
  }
  static Vec load(const float* at) {
    Vec v;
    std::memcpy(v.lane, at, sizeof v.lane);
    return v;
  }
  void store(float* at) const { std::memcpy(at, lane, sizeof lane); }
  static Vec add(Vec a, const Vec& b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Vec fma(const Vec& a, const Vec& b, Vec c) {
    for (int i = 0; i < kLanes; ++i) c.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
    return c;
  }
};

#include "linear_panels.h"

}  // namespace portable

#ifdef SELFREWARD_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {

constexpr int kLanes = 8, kRegisters = 16;

struct Vec {
  __m256 v;
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec broadcast(float value) { return {_mm256_set1_ps(value)}; }
  static Vec load(const float* at) { return {_mm256_loadu_ps(at)}; }
  void store(float* at) const { _mm256_storeu_ps(at, v); }
  static Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
};

#include "linear_panels.h"

}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f")
namespace avx512 {

constexpr int kLanes = 16, kRegisters = 32;

struct Vec {
  __m512 v;
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }
  static Vec load(const float* at) { return {_mm512_loadu_ps(at)}; }
  void store(float* at) const { _mm512_storeu_ps(at, v); }
  static Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
};

#include "linear_panels.h"

}  // namespace avx512
#pragma GCC pop_options
#endif

}  // namespace

void linear_pack(const float* w, int64_t outputs, int64_t depth, float* packed) {
  for (int64_t first = 0; first < outputs; first += kPanel) {
    float* panel = packed + first * depth;
    for (int64_t k = 0; k < depth; k += kLine) {  // a cache line of each output at a time
      const int64_t end = k + kLine < depth ? k + kLine : depth;
      for (int64_t o = 0; o < kPanel; ++o)
        for (int64_t i = k; i < end; ++i)
          panel[i * kPanel + o] = first + o < outputs ? w[(first + o) * depth + i] : 0.0f;
    }
  }
}

LinearLevel linear_level(int index) {
#ifdef SELFREWARD_X86
  if (__builtin_cpu_supports("avx512f") && index-- == 0) return {"avx512", avx512::panels};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && index-- == 0) return {"avx2", avx2::panels};
#endif
  if (index == 0) return {"portable", portable::panels};
  return {"", nullptr};
}

void linear(const LinearArguments& a, int threads, LinearPanels panels) {
  const int64_t count = (a.outputs + kPanel - 1) / kPanel;
  // Below about 150 microseconds of work another thread does not pay: on a busy machine it may not be running, and the
  // caller waits for it. Microseconds at 130 multiply-adds and 40 bytes of weights a nanosecond:
  const double weights = double(count * kPanel) * double(a.depth);
  const double least = std::max(double(a.rows) * weights / 130e3, 4 * weights / 40e3);
  if (least < 150 && !share_little()) threads = 1;
  // Pieces of neighbouring panels, so that the fetch ahead is of use; several per thread, so that none waits long.
  const int64_t pieces = threads == 1 ? 1 : (count < 8 * threads ? count : 8 * threads);
  parallel_for(pieces, threads, [&](int64_t i) { panels(a, count * i / pieces, count * (i + 1) / pieces); });
}

}  // namespace selfreward
