// A job is a counter that every thread takes indices from, so a thread that is late or slow costs nothing: the caller
// works too, and waits only for those that have begun. It waits for them also where work throws: the job that they hold
// is on its stack.

#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include "compiler.h"

#ifdef __unix__
#include <pthread.h>
#endif

namespace selfreward {
namespace {

struct Job {
  const std::function<void(int64_t)>& work;
  const int64_t count;
  const int seats;             // threads that may join the caller
  std::atomic<int> active{0};  // threads that joined and have not left
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};  // what the first work that failed has thrown; to be read when all threads have left

  void run() {
    try {
      for (int64_t i = next++; i < count; i = next++) work(i);
    } catch (...) {
      next = count;  // nobody begins another piece
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
};

constexpr int kLook = 200;  // microseconds

// Returns when `ready` or after a while. Steps of a model call one kernel after another, so a thread that has worked
// looks for the next call a little before it sleeps.
template <typename Ready>
void spin(const Ready& ready) {
  using clock = std::chrono::steady_clock;
  for (const auto end = clock::now() + std::chrono::microseconds(kLook); clock::now() < end;)
    for (int i = 0; i < 16; ++i) {
      if (ready()) return;
      PAUSE();
    }
}

class Pool {
 public:
  void run(Job& job) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (threads_ < job.seats && start()) {
    }
    job_ = &job;
    free_ = job.seats;
    lock.unlock();
    for (int64_t i = job.seats; i > 0; --i) wake_.notify_one();  // those that have a seat, not a server's 64
    job.run();
    lock.lock();
    if (job_ == &job) {
      job_ = nullptr;
      free_ = 0;
    }
    lock.unlock();
    spin([&] { return job.active == 0; });
    lock.lock();
    left_.wait(lock, [&] { return job.active == 0; });
  }

  bool looking() const { return looking_ > 0; }

 private:
  bool start() {
    try {
      std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      return false;  // the system allows no more threads: go on with those that there are
    }
    ++threads_;
    return true;
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return free_ > 0; });
      Job& job = *job_;
      --free_;
      ++job.active;
      lock.unlock();
      job.run();
      lock.lock();
      if (--job.active == 0) left_.notify_all();
      lock.unlock();
      ++looking_;
      spin([&] { return free_ > 0; });
      --looking_;
      lock.lock();
    }
  }

  std::mutex mutex_;  // guards all below, and a job's `active`; who spins reads both without it
  std::condition_variable wake_, left_;
  Job* job_ = nullptr;  // the latest call's: of calls at the same time the others go on with the threads that they have
  std::atomic<int> free_{0};     // its seats that nobody has taken
  std::atomic<int> looking_{0};  // threads that look for work before they sleep
  int threads_ = 0;
};

Pool* pool;  // never destroyed: its threads wait in it until the process ends

Pool& the_pool() {
  static const bool made = [] {
    pool = new Pool;
#ifdef __unix__
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });  // a forked child has none of its parent's threads
#endif
    return true;
  }();
  (void)made;
  return *pool;
}

}  // namespace

namespace {
std::atomic<bool> sharing_little{false};
}

double worth_sharing() { return sharing_little ? 1e-6 : the_pool().looking() ? 8 : 40; }
void set_share_little(bool share) { sharing_little = share; }

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& work) {
  const int64_t others = (threads < count ? threads : count) - 1;
  Job job{work, count, int(others > 0 ? others : 0)};
  if (others > 0)
    the_pool().run(job);
  else
    job.run();
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace selfreward
