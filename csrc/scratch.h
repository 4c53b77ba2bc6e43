// Memory of a thread that is kept for its next calls, as fresh memory costs a fault a page.
#pragma once

#include <cstdint>
#include <memory>

namespace selfreward {

// To be thread_local. What get() returns is valid until the next get().
class Scratch {
 public:
  // `bytes` or more from the beginning of a cache line on, not cleared. May throw bad_alloc, and then holds nothing.
  char* get(int64_t bytes) {
    if (bytes > bytes_) {
      bytes_ = 0;
      memory_.reset();
      memory_.reset(new char[size_t(bytes + kAlign)]);
      bytes_ = bytes;
    }
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + (kAlign - address % kAlign) % kAlign;
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(get(count * int64_t(sizeof(float)))); }

 private:
  static constexpr uintptr_t kAlign = 64;
  std::unique_ptr<char[]> memory_;
  int64_t bytes_ = 0;
};

}  // namespace selfreward
