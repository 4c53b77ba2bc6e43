// Threads for the kernels, kept between calls. One that looks for work joins in about a microsecond, one that sleeps in
// 50 to 100 (virtual machine, idle core).
#pragma once

#include <cstdint>
#include <functional>

namespace selfreward {

// Microseconds of one thread's work from which on it pays to share it: few while another thread looks for work; else
// one has to wake, and on a busy machine it may be stopped in mid-piece.
double worth_sharing();

// Calls work(i) once for every i in [0, count), on the calling thread and at most `threads` - 1 others; which thread
// takes which i is not defined, so a result must not depend on it. Returns when all is done. Calls at the same time
// share the threads. If work throws, no more of it begins, and what the first one threw is thrown here once all have
// ended.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& work);

// Work is shared out however little it is, or no more; for tests of what threads do to the results.
void set_share_little(bool share);

}  // namespace selfreward
