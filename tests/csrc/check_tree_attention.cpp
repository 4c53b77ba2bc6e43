#include <vector>

#include "driver.h"
#include "tree_attention.h"

namespace {

// `end` of a pack of trees, each a prompt with answers, and the windows' bounds.
void grow(int64_t prompt, const std::vector<int64_t>& answers, std::vector<int64_t>& end,
          std::vector<int64_t>& bounds) {
  int64_t stop = int64_t(end.size()) + prompt;
  for (const int64_t answer : answers) stop += answer;
  end.insert(end.end(), size_t(prompt), stop);
  for (const int64_t answer : answers) end.insert(end.end(), size_t(answer), int64_t(end.size()) + answer);
  bounds.push_back(stop);
}

void check_trees(int64_t heads, int64_t groups, int64_t dim) {
  std::vector<int64_t> ends, starts{0};
  grow(1, {}, ends, starts);
  grow(70, {3, 65}, ends, starts);
  grow(5, {60, 1, 17}, ends, starts);
  const int64_t tokens = int64_t(ends.size()), windows = int64_t(starts.size()) - 1;
  driver::Agreement agreement;
  driver::every_way(
      selfreward::tree_attention_level, driver::shape_of("heads", heads, "groups", groups, "dim", dim),
      [&](auto run, int threads, int slack) {
        const int64_t stride = (heads + 2 * groups) * dim, queries = tokens * heads * dim, keys = tokens * groups * dim;
        const driver::Buffer<float> qkv("qkv", tokens * stride, slack), dout("dout", queries, slack);
        const driver::Buffer<int64_t> end("end", ends, slack), bounds("bounds", starts, slack);
        const driver::Buffer<float> out("out", queries, slack), lse("lse", heads * tokens, slack);
        const driver::Buffer<float> dq("dq", queries, slack), dk("dk", keys, slack), dv("dv", keys, slack);
        driver::Random random(6);
        random.fill(qkv, 3.0f), random.fill(dout);
        const float *q = qkv, *k = q + heads * dim, *v = k + groups * dim;
        selfreward::TreeAttentionArguments a{q,       k,      v,     stride,  stride,  stride,  end,
                                             bounds,  out,    lse,   nullptr, nullptr, nullptr, nullptr,
                                             windows, tokens, heads, groups,  dim};
        selfreward::tree_attention(a, threads, run);
        agreement.check_finite(out);
        agreement.check_finite(lse);
        a.dout = dout, a.dq = dq, a.dk = dk, a.dv = dv;
        selfreward::tree_attention(a, threads, run);
        agreement.check_finite(dq);
        agreement.check_finite(dk);
        agreement.check_finite(dv);
      });
}

void check_tree_attention() {
  for (const int64_t dim : {1, 7, 64, 80, 129}) check_trees(4, 2, dim);
  check_trees(3, 3, 16);
}

const driver::Check check("tree_attention", driver::kLevels, check_tree_attention);

}  // namespace
