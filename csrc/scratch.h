// Memory that a thread keeps between calls, so that no call waits for pages from the system.
#pragma once

#include <cstdint>
#include <memory>

namespace selfreward {

class Scratch {
 public:
  // Aligned to a cache line, valid until the next call.
  float* floats(int64_t count) {
    if (count > size_) {
      memory_.reset();
      memory_.reset(new float[size_t(count + kLine)]);
      size_ = count;
    }
    const auto address = reinterpret_cast<uintptr_t>(memory_.get()) / sizeof(float);
    return memory_.get() + (uintptr_t(kLine) - address % uintptr_t(kLine)) % uintptr_t(kLine);
  }

 private:
  static constexpr int64_t kLine = 16;
  std::unique_ptr<float[]> memory_;
  int64_t size_ = 0;
};

}  // namespace selfreward
