// An operand of attention.
#pragma once

#include <cstdint>

namespace difffast {

// [batch, heads, rows, head_dim] with element strides.
struct View4 {
  const void* data;
  int64_t stride[4];
};

}  // namespace difffast
