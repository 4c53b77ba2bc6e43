// What the checks of the kernels share: memory that notices a stray access, every way to run a kernel, comparison of
// what the ways give. A kernel's check is one function in one file, made known by a static `Check`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

namespace driver {

// Prints what is wrong and what was running, and ends the process.
[[noreturn]] void fail(const std::string& what);

inline void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

// `levels`: the names of all levels that the kernel has in the source; those that this CPU lacks are reported.
struct Check {
  Check(const char* name, std::vector<std::string> levels, void (*run)());
};
inline const std::vector<std::string> kLevels = {"avx512", "avx2", "portable"};

// Says what runs next, for the message if it fails.
void enter(const std::string& shape, const std::string& level = "", int threads = 1, int slack = 0);

// "rows 7, dim 129"
template <typename... Rest>
std::string shape_of(const char* name, int64_t value, Rest... rest) {
  std::string text = std::string(name) + " " + std::to_string(value);
  if constexpr (sizeof...(rest) > 0) text += ", " + shape_of(rest...);
  return text;
}

// `run`, after a pause in which other threads can come and take work: else the caller, who need not be woken, has
// mostly done all of it before, and nothing is seen of threads that get into each other's way.
void pause();
template <typename Result, typename... Arguments>
auto pausing(Result (*run)(Arguments...)) {
  static Result (*after)(Arguments...);
  after = run;
  return +[](Arguments... arguments) -> Result {
    pause();
    return after(arguments...);
  };
}

#ifdef __SANITIZE_THREAD__
constexpr int kSlacks[] = {0};  // it is slow, and sees nothing more with others
#else
constexpr int kSlacks[] = {0, 1, 3};
#endif

// Calls body(run, threads, slack) at every level that this CPU has, with 1, 2 and 3 threads and every slack (Buffer).
template <typename LevelAt, typename Body>
void every_way(LevelAt level_at, const std::string& shape, Body body) {
  for (int index = 0;; ++index) {
    const auto [name, run] = level_at(index);
    if (!*name) return;
    for (const int threads : {1, 2, 3})
      for (const int slack : kSlacks) {
        enter(shape, name, threads, slack);
        body(threads > 1 ? pausing(run) : run, threads, slack);
      }
  }
}

// Bytes that end `slack` bytes before a page that cannot be touched. What lies before and behind them is all ones,
// which is a NaN in every float, and must stay so: that is checked at the end. AddressSanitizer guards it too, to whole
// words of eight bytes, but it does not see masked vector loads and stores: those the page stops.
class Fence {
 public:
  Fence(const char* name, size_t bytes, size_t slack);
  ~Fence();
  Fence(const Fence&) = delete;
  Fence& operator=(const Fence&) = delete;
  const char* name() const { return name_; }

 protected:
  unsigned char* begin_;

 private:
  void guard(bool on) const;

  const char* name_;
  unsigned char *memory_, *end_, *page_;
};

// `count` values, all ones at first. The slack shifts them against the alignment that the page's end would give.
template <typename T>
class Buffer : public Fence {
 public:
  Buffer(const char* name, int64_t count, int slack)
      : Fence(name, size_t(count) * sizeof(T), size_t(slack) * sizeof(T)), count_(count) {}
  Buffer(const char* name, const std::vector<T>& values, int slack) : Buffer(name, int64_t(values.size()), slack) {
    if (!values.empty()) std::memcpy(begin_, values.data(), values.size() * sizeof(T));
  }
  int64_t size() const { return count_; }
  T* begin() const { return reinterpret_cast<T*>(begin_); }
  T* end() const { return begin() + count_; }
  operator T*() const { return begin(); }
  void fill(T value) const {
    for (T& at : *this) at = value;
  }

 private:
  int64_t count_;
};

// Numbers from -1 to 1, the same for the same seed.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}
  uint64_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return state_ >> 33;
  }
  float uniform() { return float(next()) * 0x1p-30f - 1.0f; }
  void fill(const Buffer<float>& buffer, float scale = 1.0f) {
    for (float& value : buffer) value = scale * uniform();
  }

 private:
  uint64_t state_;
};

std::string text_of(double value);

template <typename T>
std::string element_text(const Buffer<T>& buffer, int64_t i) {
  return std::string(buffer.name()) + "[" + std::to_string(i) + "] is " + text_of(double(buffer[i]));
}

// What one way to run a kernel gave, for the others to be compared with bit by bit.
class Agreement {
 public:
  // NaN wherever something is NaN here, whatever its payload; else the same bits.
  template <typename T>
  void check(const Buffer<T>& found) {
    const auto [first, fresh] = first_.try_emplace(found.name());
    std::vector<unsigned char>& bytes = first->second;
    if (fresh && found.size()) {
      bytes.resize(size_t(found.size()) * sizeof(T));
      std::memcpy(bytes.data(), found.begin(), bytes.size());
    }
    for (int64_t i = 0; i < found.size(); ++i) {
      T expected;
      std::memcpy(&expected, bytes.data() + size_t(i) * sizeof(T), sizeof(T));
      if constexpr (std::is_floating_point_v<T>)
        if (std::isnan(expected) && std::isnan(found[i])) continue;
      if (std::memcmp(&expected, found + i, sizeof(T)))
        fail(element_text(found, i) + "; the first way gave " + text_of(double(expected)));
    }
  }

  // Also no NaN: nothing is left unwritten, and nothing read that is not the kernel's.
  void check_finite(const Buffer<float>& found) {
    for (int64_t i = 0; i < found.size(); ++i)
      if (!std::isfinite(found[i])) fail(element_text(found, i));
    check(found);
  }

 private:
  std::map<std::string, std::vector<unsigned char>> first_;
};

}  // namespace driver
