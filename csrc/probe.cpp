// Every thread does the same amount at the same time; the rate is the total over the time until the last one is done.

#include "probe.h"

#include <chrono>
#include <vector>

#include "threads.h"

#define SELFREWARD_BODY "probe_run.h"
#include "levels.h"

namespace selfreward {

Level<ProbeRun> probe_level(int index) { return level_at(index); }

double probe(const ProbeArguments& a, int threads, ProbeRun run) {
  std::vector<float> kept(size_t(threads), 0.0f);  // so that the work cannot be left out
  const int64_t share = a.count / threads / 128 * 128;
  const auto work = [&](int64_t thread) {
    kept[size_t(thread)] = run(a.memory ? ProbeArguments{a.memory + thread * share, share} : a);
  };
  const auto start = std::chrono::steady_clock::now();
  parallel_for(threads, threads, work);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const double done = a.memory ? double(share) * sizeof(float) : 2.0 * double(kProbeRound) * double(a.count);
  return done * threads / seconds * 1e-9;
}

}  // namespace selfreward
