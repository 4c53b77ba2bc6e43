// One instruction level's rms_norm: included by levels.h.

void run(const RmsNormArguments& a, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const float* x = a.x + row * a.dim;
    float* out = a.out + row * a.dim;
    Vec squares = Vec::broadcast(0.0f);
    for (int64_t i = 0; i < a.dim; i += kLanes) {
      const Vec part = load_upto(x + i, a.dim - i);
      squares = fma(part, part, squares);
    }
    const Vec scale = Vec::broadcast(1.0f / std::sqrt(sum(squares) / float(a.dim) + a.eps));
    for (int64_t i = 0; i < a.dim; i += kLanes) {
      const Vec part = load_upto(x + i, a.dim - i), weight = load_upto(a.weight + i, a.dim - i);
      store_upto(weight * (part * scale), out + i, a.dim - i);
    }
  }
}
