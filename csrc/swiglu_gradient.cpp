// With s = 1 / (1 + exp(-gate)): dgate = dout up s (1 + gate (1 - s)), dup = dout gate s, element by element; s is made
// again from the gate, so that nothing but gate_up is kept between forward and backward.

#include "swiglu_gradient.h"

#include "runs.h"

#define SELFREWARD_BODY "swiglu_gradient_rows.h"
#include "levels.h"

namespace selfreward {

Level<SwigluGradientRows> swiglu_gradient_level(int index) { return level_at(index); }

void swiglu_gradient(const SwigluGradientArguments& a, int threads, SwigluGradientRows rows) {
  parallel_runs(Runs(a.rows, 16 * a.ffn, threads), threads,
                [&](int64_t, int64_t first, int64_t last) { rows(a, first, last); });
}

}  // namespace selfreward
