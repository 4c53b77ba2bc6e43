#include "driver.h"
#include "product.h"

namespace {

using selfreward::Matrix;

// Each of the factors as it is, or transposed; many rows: more than one section.
void check_shape(int64_t rows, int64_t columns, int64_t depth, bool a_transposed, bool b_transposed, bool add) {
  driver::Agreement agreement;
  driver::every_way(
      selfreward::product_level,
      driver::shape_of("rows", rows, "columns", columns, "depth", depth, "a^T", a_transposed, "b^T", b_transposed),
      [&](auto run, int threads, int slack) {
        const driver::Buffer<float> a("a", rows * depth, slack), b("b", depth * columns, slack);
        const driver::Buffer<float> out("out", rows * columns, slack);
        driver::Random random(5);
        random.fill(a), random.fill(b);
        if (add) random.fill(out);
        const Matrix left{a, a_transposed ? rows : depth, a_transposed},
            right{b, b_transposed ? depth : columns, b_transposed};
        selfreward::product(left, right, out, columns, rows, columns, depth, add, threads, run);
        agreement.check_finite(out);
      });
}

void check_product() {
  for (const int64_t rows : {0, 1, 5, 6, 7, 13})
    for (const int64_t columns : {1, 63, 65})
      for (const int64_t depth : {1, 7, 257})
        for (const int transposed : {0, 1, 2, 3})
          check_shape(rows, columns, depth, transposed & 1, transposed & 2, (rows + columns) % 2);
  check_shape(300, 65, 7, false, false, true);
  check_shape(300, 65, 7, true, true, false);
  check_shape(7, 65, 2100, false, false, false);  // more than a slab of the depth
  check_shape(7, 65, 2100, true, true, true);
  check_shape(513, 65, 2100, true, false, true);  // more of a transposed a's rows than are packed at a time
  check_shape(3, 0, 7, true, false, false);
}

const driver::Check check("product", driver::kLevels, check_product);

}  // namespace
