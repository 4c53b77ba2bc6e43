// The gradients of the operations that work row by row, RoPE, and the log-probs of rows.
#include <vector>

#include "driver.h"
#include "logprob.h"
#include "rms_norm_gradient.h"
#include "rope.h"
#include "swiglu_gradient.h"

namespace {

void check_norm(int64_t rows, int64_t dim, bool add) {
  driver::Agreement agreement;
  driver::every_way(selfreward::rms_norm_gradient_level, driver::shape_of("rows", rows, "dim", dim, "add", add),
                    [&](auto run, int threads, int slack) {
                      const driver::Buffer<float> x("x", rows * dim, slack), dy("dy", rows * dim, slack);
                      const driver::Buffer<float> weight("weight", dim, slack), dsum("dsum", rows * dim, slack);
                      const driver::Buffer<float> dx("dx", rows * dim, slack), dweight("dweight", dim, slack);
                      const int64_t blocks = (rows + selfreward::kNormBlock - 1) / selfreward::kNormBlock;
                      const driver::Buffer<float> parts("parts", blocks * dim, slack);
                      driver::Random random(1);
                      random.fill(x), random.fill(dy), random.fill(weight), random.fill(dsum);
                      selfreward::rms_norm_gradient(
                          {x, weight, dy, add ? dsum.begin() : nullptr, dx, parts, rows, dim, 1e-5f}, dweight, threads,
                          run);
                      agreement.check_finite(dx);
                      agreement.check_finite(dweight);
                    });
}

void check_swiglu(int64_t rows, int64_t ffn) {
  driver::Agreement agreement;
  driver::every_way(selfreward::swiglu_gradient_level, driver::shape_of("rows", rows, "ffn", ffn),
                    [&](auto run, int threads, int slack) {
                      const driver::Buffer<float> gate_up("gate_up", 2 * rows * ffn, slack);
                      const driver::Buffer<float> dout("dout", rows * ffn, slack);
                      const driver::Buffer<float> out("out", 2 * rows * ffn, slack);
                      driver::Random random(2);
                      random.fill(gate_up, 200.0f), random.fill(dout);  // beyond where e^x is 0 or infinite
                      selfreward::swiglu_gradient({gate_up, dout, out, rows, ffn}, threads, run);
                      agreement.check_finite(out);
                    });
}

void check_rope(int64_t rows, int64_t heads, int64_t dim, bool back) {
  driver::Agreement agreement;
  driver::every_way(selfreward::rope_level, driver::shape_of("rows", rows, "heads", heads, "dim", dim, "back", back),
                    [&](auto run, int threads, int slack) {
                      const int64_t stride = heads * dim + 3, size = rows ? (rows - 1) * stride + heads * dim : 0;
                      const driver::Buffer<float> x("x", size, slack), out("out", rows * heads * dim, slack);
                      const driver::Buffer<float> cos("cos", rows * dim / 2, slack), sin("sin", rows * dim / 2, slack);
                      driver::Random random(3);
                      random.fill(x), random.fill(cos), random.fill(sin);
                      selfreward::rope({x, stride, cos, sin, out, rows, heads, dim, back}, threads, run);
                      agreement.check_finite(out);
                    });
}

void check_logprob(int64_t rows, int64_t columns) {
  driver::Agreement agreement;
  driver::every_way(selfreward::logprob_level, driver::shape_of("rows", rows, "columns", columns),
                    [&](auto run, int threads, int slack) {
                      const int64_t stride = columns + 5, size = rows ? (rows - 1) * stride + columns : 0;
                      const driver::Buffer<float> logits("logits", size, slack), hit("hit", rows, slack);
                      const driver::Buffer<int64_t> targets("targets", rows, slack);
                      const driver::Buffer<float> best("best", rows, slack), lse("lse", rows, slack);
                      const driver::Buffer<double> total("total", rows, slack);
                      const driver::Buffer<float> dlogp("dlogp", rows, slack), dlse("dlse", rows, slack);
                      driver::Random random(4);
                      random.fill(logits, 20.0f), random.fill(dlogp), random.fill(dlse), lse.fill(20.0f);
                      best.fill(-INFINITY), total.fill(0.0), hit.fill(0.0f);
                      for (int64_t row = 0; row < rows; ++row)  // some of them are in no tile
                        targets[row] = int64_t(random.next()) % (2 * columns + 10);
                      selfreward::LogprobArguments a{};
                      a.logits = logits, a.stride = stride, a.targets = targets, a.first = 5;
                      a.best = best, a.total = total, a.hit = hit, a.rows = rows, a.columns = columns;
                      selfreward::logprob(a, threads, run);
                      a.first += columns;  // as if it were the next tile
                      selfreward::logprob(a, threads, run);
                      agreement.check_finite(best);
                      agreement.check_finite(hit);
                      agreement.check(total);
                      a.lse = lse, a.grad_logp = dlogp, a.grad_lse = dlse;
                      selfreward::logprob(a, threads, run);
                      agreement.check_finite(logits);
                    });
}

void check_training() {
  for (const int64_t size : {1, 7, 127, 129, 1039}) {
    for (const int64_t rows : {0, 1, 7, 70}) {
      check_norm(rows, size, rows % 2);
      check_swiglu(rows, size);
      check_logprob(rows, size);
    }
    check_rope(7, 3, 2 * (size % 100), size % 2);
  }
  check_norm(130, 17, true);
  check_rope(0, 1, 2, true);
}

const driver::Check check("training", driver::kLevels, check_training);

}  // namespace
