#include "driver.h"
#include "embed.h"

namespace {

constexpr int64_t kVocab = 5;

template <typename T>
void check_shape(int64_t rows, int64_t dim) {
  constexpr bool kBf16 = sizeof(T) == 2;
  driver::Agreement agreement;
  driver::every_way(selfreward::embed_level, driver::shape_of("rows", rows, "dim", dim, "bf16", kBf16),
                    [&](auto run, int threads, int slack) {
                      const driver::Buffer<T> table("table", kVocab * dim, slack);
                      const driver::Buffer<int64_t> tokens("tokens", rows, slack);
                      const driver::Buffer<float> out("out", rows * dim, slack);
                      driver::Random random(2);
                      for (T& value : table) value = T(random.next() & 0x3FFF);  // finite as bf16 too
                      for (int64_t& token : tokens) token = int64_t(random.next() % kVocab);
                      selfreward::embed({tokens, table, kBf16, out, rows, dim}, threads, run);
                      agreement.check_finite(out);
                    });
}

void check_embed() {
  for (const int64_t dim : {1, 7, 127, 129, 4095})
    for (const int64_t rows : {0, 1, 61}) check_shape<float>(rows, dim), check_shape<uint16_t>(rows, dim);
}

const driver::Check check("embed", driver::kLevels, check_embed);

}  // namespace
