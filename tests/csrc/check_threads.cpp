// The pool hands out every index once, to one caller and to several at the same time, and what its threads wrote is
// there when a call returns. What work throws, on whichever thread, is thrown by the call.

#include <atomic>
#include <new>
#include <thread>

#include "driver.h"
#include "threads.h"

namespace {

void call(int64_t count, int threads) {
  std::vector<int> calls(static_cast<size_t>(count));  // no atomics: an index has one thread
  selfreward::parallel_for(count, threads, [&](int64_t i) { ++calls[size_t(i)]; });
  for (const int number : calls) driver::require(number == 1, "an index was not handed out once");
}

// Work that throws on another thread than the caller's, or on that one. The others work until then, so that it comes.
void throwing(bool elsewhere, int threads) {
  const auto caller = std::this_thread::get_id();
  std::atomic<bool> thrown{false};
  std::atomic<int> working{0};
  bool caught = false;
  try {
    selfreward::parallel_for(1 << 20, threads, [&](int64_t) {
      ++working;
      if ((std::this_thread::get_id() != caller) == elsewhere) {
        --working;
        thrown = true;
        throw std::bad_alloc();
      }
      while (!thrown) std::this_thread::yield();
      --working;
    });
  } catch (const std::bad_alloc&) {
    caught = true;
  }
  driver::require(caught, "what work threw was lost");
  driver::require(working == 0, "the call ended before its work");
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
  for (const int threads : {1, 2, 3, 8}) {
    driver::enter("work throws", "", threads);
    for (int i = 0; i < 100; ++i) {
      throwing(false, threads);
      if (threads > 1) throwing(true, threads);
      call(7, threads);  // the pool goes on
    }
  }
}

const driver::Check check("threads", {}, check_threads);

}  // namespace
