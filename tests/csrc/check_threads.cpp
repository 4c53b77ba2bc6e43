// The pool hands out every index once, to one caller and to several at the same time, and what its threads wrote is
// there when a call returns.

#include <thread>

#include "driver.h"
#include "threads.h"

namespace {

void call(int64_t count, int threads) {
  std::vector<int> calls(static_cast<size_t>(count));  // no atomics: an index has one thread
  selfreward::parallel_for(count, threads, [&](int64_t i) { ++calls[size_t(i)]; });
  for (const int number : calls) driver::require(number == 1, "an index was not handed out once");
}

void check_threads() {
  for (const int64_t count : {0, 1, 2, 7, 1000})
    for (const int threads : {1, 2, 3, 8}) {
      driver::enter(driver::shape_of("count", count), "", threads);
      for (int i = 0; i < 100; ++i) call(count, threads);
    }
  driver::enter("four callers", "", 3);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([] {
      for (int i = 0; i < 300; ++i) call(i % 13, 3);
    });
  for (std::thread& caller : callers) caller.join();
}

const driver::Check check("threads", {}, check_threads);

}  // namespace
