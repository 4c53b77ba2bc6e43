// One instruction level's rms_norm_gradient: included by levels.h.

ALWAYS_INLINE void gradient_of_row(const RmsNormGradientArguments& a, int64_t row, float* part) {
  const float *x = a.x + row * a.dim, *dy = a.dy + row * a.dim;
  Vec squares = Vec::broadcast(0.0f), products = Vec::broadcast(0.0f);
  for (int64_t i = 0; i < a.dim; i += kLanes) {
    const Vec value = load_upto(x + i, a.dim - i);
    squares = fma(value, value, squares);
    products = fma(load_upto(a.weight + i, a.dim - i) * load_upto(dy + i, a.dim - i), value, products);
  }
  const float scale = 1.0f / std::sqrt(sum(squares) / float(a.dim) + a.eps);
  const Vec factor = Vec::broadcast(scale), back = Vec::broadcast(-(scale * scale) * (sum(products) / float(a.dim)));
  for (int64_t i = 0; i < a.dim; i += kLanes) {
    const int64_t left = a.dim - i;
    const Vec value = load_upto(x + i, left), upstream = load_upto(dy + i, left);
    Vec dx = factor * fma(value, back, load_upto(a.weight + i, left) * upstream);
    if (a.dsum) dx = dx + load_upto(a.dsum + row * a.dim + i, left);
    store_upto(dx, a.dx + row * a.dim + i, left);
    store_upto(fma(upstream, value * factor, load_upto(part + i, left)), part + i, left);
  }
}

void run(const RmsNormGradientArguments& a, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    float* part = a.parts + block * a.dim;
    for (int64_t i = 0; i < a.dim; ++i) part[i] = 0.0f;
    const int64_t end = (block + 1) * kNormBlock < a.rows ? (block + 1) * kNormBlock : a.rows;
    for (int64_t row = block * kNormBlock; row < end; ++row) gradient_of_row(a, row, part);
  }
}
