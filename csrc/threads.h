// Threads for the kernels, kept between calls: waking one costs a few microseconds, starting one several tens.
#pragma once

#include <cstdint>
#include <functional>

namespace selfreward {

// Calls work(i) once for every i in [0, count), on the calling thread and at most `threads` - 1 others; which thread
// takes which i is not defined, so a result must not depend on it. `work` must not throw. Returns when all is done.
// Calls at the same time share the threads.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& work);

// Whether work is shared out however little it is, for tests of what threads do to the results. Normally it is not.
bool share_little();
void set_share_little(bool share);

}  // namespace selfreward
