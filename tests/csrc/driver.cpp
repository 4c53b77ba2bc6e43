// Runs every check, or those that are named; without an error from a sanitizer or a check, the exit status is 0.
// Misdeeds, which must end in an error, run only if they are named.

#include "driver.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <thread>

#include "threads.h"

// A kernel's scratch memory is NaN, or -1, until it is written.
extern "C" const char* __asan_default_options() {
  return "detect_leaks=0:max_malloc_fill_size=2147483647:malloc_fill_byte=255";
}
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1"; }
extern "C" const char* __tsan_default_options() { return "halt_on_error=1"; }

namespace driver {
namespace {

struct Entry {
  const char* name;
  std::vector<std::string> levels;
  void (*run)();
};

std::vector<Entry>& entries() {
  static std::vector<Entry> all;
  return all;
}

std::string running;            // kernel, shape and way
const Entry* entry;             // of the kernel
std::set<std::string> reached;  // levels
int64_t ways;

void print_running() { std::fprintf(stderr, "running: %s\n", running.c_str()); }

void run(const Entry& next) {
  entry = &next;
  running = next.name;
  reached.clear();
  ways = 0;
  next.run();
  std::printf("%s: %lld ways\n", next.name, static_cast<long long>(ways));
  for (const std::string& level : next.levels)
    std::printf(
        "  %s%s\n", level.c_str(),
        reached.count(level) ? "" : ": skipped, this CPU has no such instructions or the compiler no such code");
  require(ways > 0, "nothing ran");
  require(next.levels.empty() || reached.count("portable"), "the portable level did not run");
}

}  // namespace

void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  print_running();
  std::_Exit(1);
}

Check::Check(const char* name, std::vector<std::string> levels, void (*run)()) {
  entries().push_back({name, std::move(levels), run});
}

void enter(const std::string& shape, const std::string& level, int threads, int slack) {
  running = std::string(entry->name) + " " + level + ", " + shape_of("threads", threads, "slack", slack) + ": " + shape;
  ++ways;
  if (level.empty()) return;
  if (std::find(entry->levels.begin(), entry->levels.end(), level) == entry->levels.end())
    fail(level + " is no level that the kernel's Check names");
  reached.insert(level);
}

std::string text_of(double value) {
  char text[64];
  std::snprintf(text, sizeof text, "%g (%a)", value, value);
  return text;
}

void pause() { std::this_thread::sleep_for(std::chrono::microseconds(50)); }

Fence::Fence(const char* name, size_t bytes, size_t slack) : name_(name) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  const size_t length = (64 + bytes + slack + page - 1) / page * page;
  void* memory = mmap(nullptr, length + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  require(memory != MAP_FAILED, "no memory");
  memory_ = static_cast<unsigned char*>(memory);
  page_ = memory_ + length;
  end_ = page_ - slack;
  begin_ = end_ - bytes;
  require(mprotect(page_, page, PROT_NONE) == 0, "a page cannot be protected");
  std::memset(memory_, 0xFF, length);
  guard(true);
}

void Fence::guard(bool on) const {
  if (on) {
    ASAN_POISON_MEMORY_REGION(memory_, size_t(begin_ - memory_));
    ASAN_POISON_MEMORY_REGION(end_, size_t(page_ - end_));
  } else {
    ASAN_UNPOISON_MEMORY_REGION(memory_, size_t(page_ - memory_));
  }
}

Fence::~Fence() {
  guard(false);
  for (const unsigned char* at = memory_; at < page_; at = at + 1 == begin_ ? end_ : at + 1)
    if (*at != 0xFF)
      fail("byte " + std::to_string(at - begin_) + " of " + name_ + ", which has " + std::to_string(end_ - begin_) +
           ", was written");
  munmap(memory_, size_t(page_ - memory_) + size_t(sysconf(_SC_PAGESIZE)));
}

}  // namespace driver

int main(int count, char** names) {  // names[0] is the program
  using namespace driver;
  __sanitizer_set_death_callback(print_running);
  selfreward::set_share_little(true);
  std::sort(entries().begin(), entries().end(),
            [](const Entry& a, const Entry& b) { return std::string(a.name) < b.name; });
  for (const Entry& next : entries())
    if (count == 1 ? std::strncmp(next.name, "misdeed", 7)
                   : std::count_if(names + 1, names + count, [&](char* name) { return !std::strcmp(name, next.name); }))
      run(next);
  return 0;
}
