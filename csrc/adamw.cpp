// AdamW of bf16 parameters with a stochastically rounded write: one pass over weight, gradient and both moments.
//
// Loop order: chunks of sixteen Philox counters (128 elements), whose words stay in the first-level cache, then sixteen
// elements at a time. 22 bytes an element are read and written, so that the words, 16 bits of them, must not cost more.
// One IEEE operation a step and no FMA: every level gives the reference's bits.
//
// Measured, 16.8 million elements, two threads of an AMD EPYC (family 26, AVX-512), beside other work: 22.0 ms; torch's
// fused AdamW 22.7 ms in fp32 (28 bytes an element) and 24.0 ms all in bf16.

#include "adamw.h"

#include "runs.h"

#define SELFREWARD_BODY "adamw_chunks.h"
#include "levels.h"

namespace selfreward {

Level<AdamWChunks> adamw_level(int index) { return level_at(index); }

void adamw(const AdamWArguments& a, int threads, AdamWChunks chunks) {
  const int64_t lead = int64_t(a.first % kAdamWChunk);
  const int64_t count = a.count ? (lead + a.count + kAdamWChunk - 1) / kAdamWChunk : 0;
  parallel_runs(Runs(count, 16 * kAdamWChunk, threads), threads,
                [&](int64_t, int64_t begin, int64_t end) { chunks(a, begin, end); });
}

}  // namespace selfreward
