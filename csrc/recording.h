// The kernels' calls of one forward, kept to be made again: the CPU's counterpart of a CUDA graph. As in one, memory is
// at fixed addresses, so the caller keeps it; otherwise than in one, a replay takes any number of rows up to those that
// were recorded, because every kernel takes its rows' memory from the beginning of what was recorded.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "chunk_attention.h"
#include "embed.h"
#include "linear.h"
#include "rms_norm.h"
#include "rope_write.h"
#include "swiglu.h"

namespace selfreward {

// What differs from one replay to the next.
struct Step {
  int64_t rows;
  const int64_t *tokens, *positions, *slots;  // [rows]
  const int64_t* items;                       // [item_count, 4], as ChunkAttentionArguments has them
  const int64_t* copies;                      // [copy_count, 3], as RopeWriteArguments has them
  int64_t item_count, copy_count;
  int threads;
};

inline void set_step(LinearArguments& a, const Step& step) { a.rows = step.rows; }
inline void set_step(RmsNormArguments& a, const Step& step) { a.rows = step.rows; }
inline void set_step(SwigluArguments& a, const Step& step) { a.rows = step.rows; }
inline void set_step(RopeWriteArguments& a, const Step& step) {
  a.rows = step.rows;
  a.slots = step.slots, a.copies = step.copies, a.copy_count = step.copy_count;
}
inline void set_step(ChunkAttentionArguments& a, const Step& step) {
  a.rows = step.rows;
  a.positions = step.positions, a.items = step.items, a.item_count = step.item_count;
}

using Call = std::function<void(const Step&)>;

// `run(arguments, threads)` as a call that takes the step's rows instead of the recorded ones.
template <typename Arguments, typename Run>
Call call_of(const Arguments& arguments, const Run& run) {
  return [=](const Step& step) {
    Arguments now = arguments;
    set_step(now, step);
    run(now, step.threads);
  };
}

}  // namespace selfreward
