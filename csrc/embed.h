// Rows of an embedding table, fp32 or bf16, gathered as fp32.
#pragma once

#include <cstdint>

#include "level.h"

namespace selfreward {

struct EmbedArguments {
  const int64_t* tokens;  // [rows]
  const void* table;      // [vocab, dim], float or uint16_t, the bits of a bf16
  bool bf16;
  float* out;  // [rows, dim]
  int64_t rows, dim;
};

// Gathers the rows [first, last).
using EmbedRows = void (*)(const EmbedArguments& a, int64_t first, int64_t last);

// The `index`-th level that this CPU can run, fastest first; the last one is "portable", past it the name is empty.
Level<EmbedRows> embed_level(int index);

void embed(const EmbedArguments& a, int threads, EmbedRows rows);

}  // namespace selfreward
