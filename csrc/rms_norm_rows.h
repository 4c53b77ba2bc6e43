// One instruction level's rms_norm: included by levels.h.

// Rows whose sums of squares run side by side: a chain of dependent FMAs alone leaves most of the units idle.
constexpr int kTogether = 4;

// The lanes of a row from some feature on: all sixteen, or as many as are left.
struct Whole {
  Vec load(const float* at) const { return Vec::load(at); }
  void store(Vec x, float* at) const { x.store(at); }
};
struct Part {
  int count;
  Vec load(const float* at) const { return Vec::load_part(at, count); }
  void store(Vec x, float* at) const { x.store_part(at, count); }
};

template <typename Step>
ALWAYS_INLINE void for_each_vector(int64_t dim, Step step) {
  int64_t i = 0;
  for (; dim - i >= kLanes; i += kLanes) step(i, Whole{});
  if (i < dim) step(i, Part{int(dim - i)});
}

template <bool Add, int Rows>
ALWAYS_INLINE void norm(const RmsNormArguments& a, int64_t row) {
  const int64_t first = row * a.dim;
  Vec squares[Rows], scale[Rows];
  UNROLL for (int r = 0; r < Rows; ++r) squares[r] = Vec::broadcast(0.0f);
  for_each_vector(a.dim, [&](int64_t i, auto lanes) {
    UNROLL for (int r = 0; r < Rows; ++r) {
      const int64_t at = first + r * a.dim + i;
      Vec x = lanes.load(a.x + at);
      if (Add) {
        x = x + lanes.load(a.branch + at);
        lanes.store(x, a.sum + at);
      }
      squares[r] = fma(x, x, squares[r]);
    }
  });
  UNROLL for (int r = 0; r < Rows; ++r) scale[r] =
      Vec::broadcast(1.0f / std::sqrt(sum(squares[r]) / float(a.dim) + a.eps));
  const float* x = Add ? a.sum : a.x;
  for_each_vector(a.dim, [&](int64_t i, auto lanes) {
    const Vec weight = lanes.load(a.weight + i);
    UNROLL for (int r = 0; r < Rows; ++r) {
      const int64_t at = first + r * a.dim + i;
      lanes.store(weight * (lanes.load(x + at) * scale[r]), a.out + at);
    }
  });
}

template <bool Add>
void norms(const RmsNormArguments& a, int64_t first, int64_t last) {
  int64_t row = first;
  for (; last - row >= kTogether; row += kTogether) norm<Add, kTogether>(a, row);
  for (; row < last; ++row) norm<Add, 1>(a, row);
}

void run(const RmsNormArguments& a, int64_t first, int64_t last) {
  a.branch ? norms<true>(a, first, last) : norms<false>(a, first, last);
}
