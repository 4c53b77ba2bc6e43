#include "linear_bf16.h"

#include <cstring>

#include "linear_pack.h"
#include "linear_sizes.h"

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

namespace selfreward {
namespace {

// While it lives, this thread's arithmetic takes and gives numbers below 2^-126 as zero, as the dot instruction does
// always. Only x86: elsewhere, where only portable code runs, they count.
class FlushSubnormals {
 public:
#ifdef __SSE2__
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  FlushSubnormals() {}
#endif
};

}  // namespace
}  // namespace selfreward

#define SELFREWARD_BODY "linear_bf16_run.h"
#define SELFREWARD_BF16_RATE 65
#include "levels.h"
#undef SELFREWARD_BF16_RATE

namespace selfreward {
#ifdef SELFREWARD_X86
namespace {

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bf16,avx2,fma")
namespace avx512bf16 {
#define SELFREWARD_LANES 16
#define SELFREWARD_BF16_DOT
#define SELFREWARD_BF16_RATE 130
// clang-format off: in this order
#include "math.h"
#include "linear_bf16_run.h"
// clang-format on
}  // namespace avx512bf16
#pragma GCC pop_options

}  // namespace
#endif

namespace {

struct Pair {
  uint16_t even, odd;
};

}  // namespace

void linear_pack_bf16(const uint16_t* w, int64_t outputs, int64_t depth, int64_t first, uint16_t* packed) {
  pack_units(outputs, (depth + 1) / 2, first, reinterpret_cast<Pair*>(packed), [=](int64_t o, int64_t pair) {
    const uint16_t* at = w + o * depth + 2 * pair;
    return Pair{at[0], 2 * pair + 1 < depth ? at[1] : uint16_t(0)};
  });
}

void linear_unpack_bf16(const uint16_t* packed, int64_t outputs, int64_t depth, int64_t first, uint16_t* w) {
  unpack_units(outputs, (depth + 1) / 2, first, reinterpret_cast<const Pair*>(packed),
               [=](int64_t o, int64_t pair, Pair value) {
                 uint16_t* at = w + o * depth + 2 * pair;
                 at[0] = value.even;
                 if (2 * pair + 1 < depth) at[1] = value.odd;
               });
}

Level<LinearKernel> linear_bf16_level(int index) {
#ifdef SELFREWARD_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16") && index-- == 0)
    return {"avx512bf16", avx512bf16::run()};
#endif
  const auto level = level_at(index);
  return *level.name ? Level<LinearKernel>{level.name, level.run()} : Level<LinearKernel>{"", {}};
}

}  // namespace selfreward
