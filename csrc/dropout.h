// Which units of one token dropout keeps, the same as kernels/dropout.py.
#pragma once

#include <cstdint>

namespace selfreward {

// out[u] = 1 where word u % 4 of Philox with key `key` and counter (position, segment's low half, its high half,
// site * 2^16 + u / 4) is at least `threshold`, else 0; u in [0, units).
void dropout_row(uint64_t key, uint64_t segment, uint32_t position, uint32_t site, uint32_t threshold, int64_t units,
                 uint8_t* out);

}  // namespace selfreward
