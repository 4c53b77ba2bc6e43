// One instruction level's embed: included by levels.h.

#include "bf16_lanes.h"

template <typename T>
void gather(const EmbedArguments& a, int64_t first, int64_t last) {
  const T* table = static_cast<const T*>(a.table);
  for (int64_t row = first; row < last; ++row) {
    const T* from = table + a.tokens[row] * a.dim;
    const T* next = row + 1 < last ? table + a.tokens[row + 1] * a.dim : from;
    float* out = a.out + row * a.dim;
    int64_t i = 0;
    for (; a.dim - i >= kLanes; i += kLanes) {
      PREFETCH(next + i);
      load_wide(from + i).store(out + i);
    }
    if (i < a.dim) load_wide_part(from + i, int(a.dim - i)).store_part(out + i, int(a.dim - i));
  }
}

void run(const EmbedArguments& a, int64_t first, int64_t last) {
  a.bf16 ? gather<uint16_t>(a, first, last) : gather<float>(a, first, last);
}
