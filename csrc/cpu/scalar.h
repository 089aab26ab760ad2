// Types of tensor elements that the CPU kernels take.
#pragma once

#include <cstdint>

namespace difffast {

enum class Scalar { kFloat32, kFloat64, kBFloat16 };

struct BFloat16 {
  uint16_t bits;
};

// What is computed in: float, or double for float64.
template <class S>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

}  // namespace difffast
