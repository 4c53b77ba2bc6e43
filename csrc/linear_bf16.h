// The sampler's linear with bf16 weights: x is rounded to bf16, products are exact, sums are fp32, the same bits as
// kernels/linear_bf16.py.
#pragma once

#include <cstdint>

#include "level.h"
#include "linear_prepared.h"

namespace selfreward {

// w [outputs, depth] -> the outputs first .. first + outputs of packed [panels, ceil(depth / 2), 64, 2], as
// linear_pack.
void linear_pack_bf16(const uint16_t* w, int64_t outputs, int64_t depth, int64_t first, uint16_t* packed);
void linear_unpack_bf16(const uint16_t* packed, int64_t outputs, int64_t depth, int64_t first, uint16_t* w);

Level<LinearKernel> linear_bf16_level(int index);

}  // namespace selfreward
