// Compiles SELFREWARD_BODY, a file name, once for every instruction level, each in a namespace of its own behind the
// level's math.h. The body's templates and order of operations are shared, so all levels give the same bits.
// The body defines `run`; `level_at(i)` is the i-th level that this CPU can run, fastest first, "portable" last.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "compiler.h"
#include "level.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SELFREWARD_X86 1
#include <immintrin.h>
#endif

namespace selfreward {
namespace {

namespace portable {
#define SELFREWARD_LANES 1
#include "math.h"
#include SELFREWARD_BODY
#undef SELFREWARD_LANES
}  // namespace portable

#ifdef SELFREWARD_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define SELFREWARD_LANES 8
#include "math.h"
#include SELFREWARD_BODY
#undef SELFREWARD_LANES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma")
namespace avx512 {
#define SELFREWARD_LANES 16
#include "math.h"
#include SELFREWARD_BODY
#undef SELFREWARD_LANES
}  // namespace avx512
#pragma GCC pop_options
#endif

Level<decltype(&portable::run)> level_at(int index) {
#ifdef SELFREWARD_X86
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (fma && __builtin_cpu_supports("avx512f") && index-- == 0) return {"avx512", avx512::run};
  if (fma && index-- == 0) return {"avx2", avx2::run};
#endif
  if (index == 0) return {"portable", portable::run};
  return {"", nullptr};
}

}  // namespace
}  // namespace selfreward
