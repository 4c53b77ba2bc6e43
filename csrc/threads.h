// Threads for the kernels, kept between calls. One that looks for work joins in about a microsecond, one that sleeps in
// 50 to 100 (virtual machine, idle core).
#pragma once

#include <cstdint>
#include <functional>

namespace selfreward {

// Microseconds of work of one thread from which on a linear or attention shares it with another: it may have to wake,
// and on a busy machine it may be stopped in mid-piece.
constexpr double kWorthSharing = 40;

// Calls work(i) once for every i in [0, count), on the calling thread and at most `threads` - 1 others; which thread
// takes which i is not defined, so a result must not depend on it. `work` must not throw. Returns when all is done.
// Calls at the same time share the threads.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& work);

// Whether work is shared out however little it is, for tests of what threads do to the results. Normally it is not.
bool share_little();
void set_share_little(bool share);

}  // namespace selfreward
