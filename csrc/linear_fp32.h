// One instruction level's fp32 linear: included by levels.h. linear_panels.h says what it wants.

constexpr int kRegisters = SELFREWARD_LANES == 16 ? 32 : 8;  // AVX2: two of its 16 are a Vec
constexpr int kParts = 1;
constexpr int64_t kChain = 256;

#include "linear_float.h"

using Weights = Vec;
using Value = Vec;

ALWAYS_INLINE Weights load_weights(const char* at, int) { return Vec::load(reinterpret_cast<const float*>(at)); }
ALWAYS_INLINE Value load_value(const char* at) { return Vec::broadcast(*reinterpret_cast<const float*>(at)); }
ALWAYS_INLINE Sum dot(const Value& value, const Weights& weights, const Sum& sum) { return fma(value, weights, sum); }

#include "linear_panels.h"

void run(const LinearArguments& a, int64_t first, int64_t last) { panels(a, first, last); }
