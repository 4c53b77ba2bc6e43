// What this machine can do at most, for benchmarks to stand beside: fp32 multiply-adds and reads from memory.
#pragma once

#include <cstdint>

#include "level.h"

namespace selfreward {

struct ProbeArguments {
  const float* memory;  // read from its beginning to its end; null: multiply-adds in registers
  int64_t count;        // floats, a multiple of 16, or rounds of kProbeRound multiply-adds
};

constexpr int kProbeChains = 12;  // enough to hide the latency of two units, few enough for registers
constexpr int64_t kProbeRound = 16 * kProbeChains;

// Does the work of one thread; returns a value that depends on all of it.
using ProbeRun = float (*)(const ProbeArguments& a);

Level<ProbeRun> probe_level(int index);

// Billions of floating-point operations (2 a multiply-add), or of bytes, per second, on `threads` threads.
double probe(const ProbeArguments& a, int threads, ProbeRun run);

}  // namespace selfreward
