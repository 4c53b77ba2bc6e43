// One instruction level's swiglu_gradient: included by levels.h.

void run(const SwigluGradientArguments& a, int64_t first, int64_t last) {
  const Vec zero = Vec::broadcast(0.0f), one = Vec::broadcast(1.0f);
  for (int64_t row = first; row < last; ++row) {
    const float *gates = a.gate_up + row * 2 * a.ffn, *ups = gates + a.ffn, *dout = a.dout + row * a.ffn;
    float *dgates = a.dgate_up + row * 2 * a.ffn, *dups = dgates + a.ffn;
    for (int64_t i = 0; i < a.ffn; i += kLanes) {
      const int64_t left = a.ffn - i;
      const Vec gate = load_upto(gates + i, left), up = load_upto(ups + i, left), d = load_upto(dout + i, left);
      const Vec s = one / (one + exp(zero - gate));
      store_upto(d * up * s * fma(gate, one - s, one), dgates + i, left);
      store_upto(d * (gate * s), dups + i, left);
    }
  }
}
