// geglu on the CPU; raw pointers only, so that it compiles and can be tested without PyTorch.
#pragma once

#include <cstdint>

#include "scalar.h"

namespace difffast {

// out[row, c] = x[row, c] * gelu(x[row, channels + c]).
struct Geglu {
  Scalar dtype;
  int64_t channels;
  const void* x;  // [rows, 2 channels], dense
  void* out;  // [rows, channels], dense
};

// Rows [begin, end); none depends on another.
void geglu_rows(const Geglu& p, int64_t begin, int64_t end);

}  // namespace difffast
