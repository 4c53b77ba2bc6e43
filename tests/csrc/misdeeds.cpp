// What a kernel must not do, for a test that the driver notices.

#include <cstdint>
#include <memory>

#include "driver.h"
#include "threads.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

using driver::Buffer;
volatile float sink;

void read_behind() { sink = Buffer<float>("out", 5, 0)[5]; }
void read_slack() { sink = Buffer<float>("out", 6, 3)[6]; }
void read_before() { sink = Buffer<float>("out", 6, 0)[-1]; }

// Sanitizers do not see these two.
#ifdef __x86_64__
__attribute__((target("avx"))) void read_behind_masked() {
  if (!__builtin_cpu_supports("avx")) driver::fail("no masked loads on this CPU");
  const Buffer<float> out("out", 5, 0);
  const __m256 six = _mm256_maskload_ps(out, _mm256_setr_epi32(-1, -1, -1, -1, -1, -1, 0, 0));
  sink = _mm256_cvtss_f32(six);
}
__attribute__((target("avx"))) void write_slack_masked() {
  if (!__builtin_cpu_supports("avx")) driver::fail("no masked stores on this CPU");
  const Buffer<float> out("out", 5, 3);
  _mm256_maskstore_ps(out, _mm256_setr_epi32(-1, -1, -1, -1, -1, -1, 0, 0), _mm256_setzero_ps());
}
#else
void read_behind_masked() { driver::fail("no masked loads on this CPU"); }
void write_slack_masked() { driver::fail("no masked stores on this CPU"); }
#endif

void leave_unwritten() { driver::Agreement().check_finite(Buffer<float>("out", 5, 0)); }

void disagree() {
  driver::Agreement agreement;
  for (const float value : {0.0f, -0.0f}) {
    const Buffer<float> out("out", 5, 0);
    out.fill(value);
    agreement.check_finite(out);
  }
}

void use_scratch_unwritten() {
  const std::unique_ptr<float[]> scratch(new float[5]);
  const Buffer<float> out("out", 5, 0);
  out.fill(scratch[4]);
  driver::Agreement().check_finite(out);
}

void overflow() {
  const Buffer<int32_t> out("out", 1, 0);
  out.fill(INT32_MAX);
  ++out[0];
}

void race() {
  const Buffer<float> out("out", 1, 0);
  out.fill(0.0f);
  selfreward::parallel_for(20, 2, [&](int64_t) {
    driver::pause();
    out[0] += 1.0f;
  });
}

const driver::Check checks[] = {
    {"misdeed: read_behind", {}, read_behind},
    {"misdeed: read_slack", {}, read_slack},
    {"misdeed: read_before", {}, read_before},
    {"misdeed: read_behind_masked", {}, read_behind_masked},
    {"misdeed: write_slack_masked", {}, write_slack_masked},
    {"misdeed: leave_unwritten", {}, leave_unwritten},
    {"misdeed: disagree", {}, disagree},
    {"misdeed: use_scratch_unwritten", {}, use_scratch_unwritten},
    {"misdeed: overflow", {}, overflow},
    {"misdeed: race", {}, race},
};

}  // namespace
