// The sampler's linear with 8-bit weights, one scale for each output: x is quantised to 8 bits in groups of 64 along
// the depth, sums within a group are integers, the same bits as kernels/linear_int8.py.
#pragma once

#include <cstdint>

#include "level.h"
#include "linear_prepared.h"

namespace selfreward {

constexpr int64_t kInt8Group = 64;  // values of x that share a scale

// w [outputs, depth] fp32 -> the outputs first .. first + outputs of packed [panels, units, 64, 4] (weights + 128, the
// depth padded to groups) and of scales [64 * panels], as linear_pack.
void linear_pack_int8(const float* w, int64_t outputs, int64_t depth, int64_t first, uint8_t* packed, float* scales);

Level<LinearKernel> linear_int8_level(int index);

}  // namespace selfreward
