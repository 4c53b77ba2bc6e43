// One instruction level's swiglu: included by levels.h.

void run(const SwigluArguments& a, int64_t first, int64_t last) {
  const Vec zero = Vec::broadcast(0.0f), one = Vec::broadcast(1.0f);
  for (int64_t row = first; row < last; ++row) {
    const float *gates = a.gate_up + row * 2 * a.ffn, *ups = gates + a.ffn;
    float* out = a.out + row * a.ffn;
    for (int64_t i = 0; i < a.ffn; i += kLanes) {
      const Vec gate = load_upto(gates + i, a.ffn - i), up = load_upto(ups + i, a.ffn - i);
      store_upto(gate / (one + exp(zero - gate)) * up, out + i, a.ffn - i);
    }
  }
}
