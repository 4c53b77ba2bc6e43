// Packed panels, filled and read: [panels, units, 64], 64 outputs side by side.
#pragma once

#include <algorithm>
#include <cstdint>

#include "linear.h"

namespace selfreward {

// The outputs first .. first + outputs of packed [panels, units, 64] from unit(output, unit); no other lane is touched.
template <typename T, typename Unit>
void pack_units(int64_t outputs, int64_t units, int64_t first, T* packed, const Unit& unit) {
  constexpr int64_t kRun = 16;  // a cache line of each output at a time
  const int64_t last = first + outputs;
  for (int64_t start = first / kPanel * kPanel; start < last; start += kPanel) {
    const int64_t end = std::min(last, start + kPanel);
    T* panel = packed + start * units;
    for (int64_t run = 0; run < units; run += kRun)
      for (int64_t o = std::max(first, start); o < end; ++o)
        for (int64_t i = run; i < std::min(run + kRun, units); ++i) panel[i * kPanel + o - start] = unit(o - first, i);
  }
}

// Calls unit(output, unit, value) for the same outputs.
template <typename T, typename Unit>
void unpack_units(int64_t outputs, int64_t units, int64_t first, const T* packed, const Unit& unit) {
  constexpr int64_t kRun = 16;
  for (int64_t start = 0; start < outputs;) {  // a panel's part of the outputs at a time
    const int64_t panel = (first + start) / kPanel, end = std::min(outputs, (panel + 1) * kPanel - first);
    for (int64_t run = 0; run < units; run += kRun)
      for (int64_t o = start; o < end; ++o)
        for (int64_t i = run; i < std::min(run + kRun, units); ++i)
          unit(o, i, packed[(panel * units + i) * kPanel + first + o - panel * kPanel]);
    start = end;
  }
}

}  // namespace selfreward
