// Sizes of the loops in linear_panels.h.
#pragma once

#include <cstdint>

namespace selfreward {

constexpr int64_t kPiece = 4;           // bytes of x that are multiplied with a unit at a time
constexpr int64_t kUnit = kPiece * 64;  // bytes of a panel's unit
constexpr int64_t kLine = 64;           // bytes of a cache line
constexpr int64_t kBlock = 256;         // units that stay in the second-level cache (64 KB) while all rows pass
constexpr int64_t kGroup = 6;           // rows of a tile at most
constexpr int64_t kRows = 252;          // rows of a section: their totals are 64 KB

}  // namespace selfreward
