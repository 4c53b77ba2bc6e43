// What the kernels need of the compiler: inlining into each instruction level's code, prefetching, unrolling, and IEEE
// arithmetic.
#pragma once

#ifdef __FAST_MATH__
#error "built with -ffast-math: results would differ between instruction levels"
#endif

#ifdef __GNUC__
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define PREFETCH(address) __builtin_prefetch(address)
#define PREFETCH_L2(address) __builtin_prefetch(address, 0, 2)
#define PREFETCH_WRITE(address) __builtin_prefetch(address, 1)
#define UNROLL _Pragma("GCC unroll 16")  // sums in an array that is not unrolled would live in memory
#else
#define ALWAYS_INLINE inline
#define NOINLINE
#define PREFETCH(address) (void)(address)
#define PREFETCH_L2(address) (void)(address)
#define PREFETCH_WRITE(address) (void)(address)
#define UNROLL
#endif

// A hint that the thread waits for another.
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() (void)0
#endif
