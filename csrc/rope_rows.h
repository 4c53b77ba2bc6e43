// One instruction level's rope: included by levels.h.

template <bool Back>
void turn(const RopeArguments& a, int64_t first, int64_t last) {
  const int64_t half = a.dim / 2;
  for (int64_t row = first; row < last; ++row)
    for (int64_t head = 0; head < a.heads; ++head) {
      const float* x = a.x + row * a.stride + head * a.dim;
      float* out = a.out + (row * a.heads + head) * a.dim;
      for (int64_t i = 0; i < half; i += kLanes) {
        const Vec c = load_upto(a.cos + row * half + i, half - i), s = load_upto(a.sin + row * half + i, half - i);
        const Vec one = load_upto(x + i, half - i), two = load_upto(x + half + i, half - i);
        store_upto(Back ? one * c + two * s : one * c - two * s, out + i, half - i);
        store_upto(Back ? two * c - one * s : two * c + one * s, out + half + i, half - i);
      }
    }
}

void run(const RopeArguments& a, int64_t first, int64_t last) {
  a.back ? turn<true>(a, first, last) : turn<false>(a, first, last);
}
