#include "driver.h"
#include "sample.h"

namespace {

struct Rule {
  float temperature;
  int64_t top_k;
  double top_p, min_p;
};

constexpr Rule kRules[] = {{1.0f, 0, 1.0, 0.0},  {0.0f, 0, 1.0, 0.0},    {0.7f, 0, 0.9, 0.0},    {1.0f, 0, 1e-9, 0.0},
                           {1.0f, 0, 0.9999, 0}, {1e6f, 0, 0.5, 0.0},    {1e-6f, 7, 0.9, 0.0},   {1.0f, 1, 1.0, 0.0},
                           {1.0f, 20, 1.0, 0.0}, {2.0f, 5000, 0.7, 0.0}, {1.0f, 0, 1.0, 1e-310}, {0.5f, 100, 0.9, 0.05},
                           {3e38f, 0, 0.9, 0.0}, {1e-38f, 0, 0.9, 0.0}};
constexpr int64_t kRuleCount = int64_t{sizeof kRules / sizeof *kRules};

constexpr int64_t kKinds = 5;

// Logits: spread evenly, all equal, in steps so that many are equal, many of them -inf, and so large that their
// differences just fit.
float logit(int64_t kind, driver::Random& random) {
  const float value = random.uniform();
  switch (kind) {
    case 0:
      return 5.0f * value;
    case 1:
      return 0.5f;
    case 2:
      return float(int(value * 4.0f));
    case 3:
      return value < 0.0f ? -INFINITY : value;
    default:
      return 1.5e38f * value;
  }
}

// Every rule with every kind of logits. Of rows 2, 5, ... some ids are forbidden, but not vocab - 1; a row has labels
// as many as row % 4.
void check_shape(int64_t rows, int64_t width, int64_t vocab) {
  std::vector<float> temperature;
  std::vector<int64_t> top_k, seeds, positions, candidates, forbidden_offsets{0}, forbidden, label_offsets{0}, labels;
  std::vector<double> top_p, min_p;
  for (int64_t row = 0; row < rows; ++row) {
    const Rule& rule = kRules[row % kRuleCount];
    temperature.push_back(rule.temperature), top_k.push_back(rule.top_k);
    top_p.push_back(rule.top_p), min_p.push_back(rule.min_p);
    seeds.push_back(-1 - row), positions.push_back(UINT32_MAX - row), candidates.push_back(row);
    for (int64_t id = 0; row % 3 == 2 && id < vocab - 1; id += 3) forbidden.push_back(id);
    if (row % 3 == 2 && width > vocab) forbidden.push_back(width - 1);
    for (int64_t i = 0; i < row % 4; ++i) labels.push_back(i % 2 ? row % width : width - 1);
    forbidden_offsets.push_back(int64_t(forbidden.size())), label_offsets.push_back(int64_t(labels.size()));
  }
  driver::Agreement agreement;
  const std::string shape = driver::shape_of("rows", rows, "width", width, "vocab", vocab);
  driver::every_way(selfreward::sample_level, shape, [&](auto run, int threads, int slack) {
    const driver::Buffer<float> logits("logits", rows * width, slack);
    driver::Random random(8);
    for (int64_t i = 0; i < logits.size(); ++i) logits[i] = logit(i / width / kRuleCount, random);
    for (int64_t row = 0; row < rows; ++row) logits[row * width + vocab - 1] = 0.25f;
    const driver::Buffer<float> temperatures("temperature", temperature, slack);
    const driver::Buffer<int64_t> ks("top_k", top_k, slack), seed("seeds", seeds, slack);
    const driver::Buffer<int64_t> position("positions", positions, slack), candidate("candidates", candidates, slack);
    const driver::Buffer<double> ps("top_p", top_p, slack), least("min_p", min_p, slack);
    const driver::Buffer<int64_t> banned_offsets("forbidden_offsets", forbidden_offsets, slack);
    const driver::Buffer<int64_t> banned("forbidden", forbidden, slack);
    const driver::Buffer<int64_t> wanted_offsets("label_offsets", label_offsets, slack);
    const driver::Buffer<int64_t> wanted("label_ids", labels, slack), ids("ids", rows, slack);
    const driver::Buffer<float> raw("raw", rows, slack), sampled("sampled", rows, slack);
    const driver::Buffer<float> label_raw("labels", wanted.size(), slack);
    const selfreward::SampleArguments arguments{
        logits,         temperatures, ks,  ps,  least,   seed,      position, candidate, banned_offsets, banned,
        wanted_offsets, wanted,       ids, raw, sampled, label_raw, rows,     width,     vocab};
    selfreward::sample(arguments, threads, run);
    for (const int64_t id : ids) driver::require(id >= 0 && id < vocab, "an id is outside the vocabulary");
    agreement.check(ids), agreement.check_finite(raw), agreement.check_finite(sampled);
    for (const float value : label_raw) driver::require(value <= 0.0f, "a log-prob is above 0 or NaN");
    agreement.check(label_raw);

    if (rows < 2) return;
    logits[width + width / 2] = NAN;  // row 1 is no distribution any more; row 0 stays as it is
    const float before = raw[0];
    selfreward::sample(arguments, threads, run);
    driver::require(std::isnan(raw[1]) && ids[1] == 0, "a row with a NaN has a draw");
    driver::require(raw[0] == before, "a row with a NaN changed another one");
  });
}

void check_sample() {
  for (const int64_t width : {1, 7, 16, 127, 129, 4095}) {
    check_shape(kKinds * kRuleCount, width, width);
    if (width > 1) check_shape(kKinds * kRuleCount, width, width - width / 3);
    check_shape(1, width, width);
  }
  check_shape(0, 7, 7);
}

const driver::Check check("sample", driver::kLevels, check_sample);

}  // namespace
