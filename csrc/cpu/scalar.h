// Types of tensor elements that the CPU kernels take.
#pragma once

#include <cstdint>

namespace difffast {

enum class Scalar { kFloat32, kFloat64, kBFloat16 };

struct BFloat16 {
  uint16_t bits;
};

// Two neighbours of a row or column along which products are added up: what AVX512_BF16 multiplies at once.
struct Pair {
  BFloat16 first, second;
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

// What sums are kept in: float, or double for float64.
inline int64_t compute_size(Scalar dtype) { return dtype == Scalar::kFloat64 ? 8 : 4; }

}  // namespace difffast
