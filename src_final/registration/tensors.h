// What the bindings of all operators share.  Files of this folder are the only ones that see PyTorch, and only through
// LibTorch's stable ABI: one build serves several PyTorch versions.  Schemas are defined in difffast/ops (they exist
// without this library); here kernels are bound to them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#ifdef DIFFFAST_WITH_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include "cpu/scalar.h"
#include "cpu/view4.h"

namespace difffast {

using torch::stable::Tensor;

// By hand: in PyTorch 2.10 the stable ABI's lists of sizes cannot be compared.
inline bool have_equal_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

// [B, C, H, W] stored as B, H, W, C without gaps.
inline bool is_channels_last(const Tensor& x) {
  if (x.dim() != 4) return false;
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  return x.stride(1) == 1 && x.stride(3) == c && x.stride(2) == w * c && x.stride(0) == h * w * c;
}

inline Tensor empty(std::vector<int64_t> sizes, torch::headeronly::ScalarType dtype, const Tensor& like) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::Contiguous);
}

// How many neighbours in a batch of `rows` share one of `given` rows; 0: they cannot.
inline int64_t repeats_of(int64_t rows, int64_t given) {
  if (given == 0) return rows == 0 ? 1 : 0;
  return rows % given == 0 ? std::max<int64_t>(1, rows / given) : 0;
}

inline Scalar scalar_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16,
                  "the C++ kernel takes float32, float64 and bfloat16");
  return dtype == ScalarType::Float    ? Scalar::kFloat32
         : dtype == ScalarType::Double ? Scalar::kFloat64
                                       : Scalar::kBFloat16;
}

inline View4 view(const Tensor& x) {
  return {x.const_data_ptr(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

#ifdef DIFFFAST_WITH_CUDA
inline void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

// None where none is needed: an empty tensor costs a call as well.
inline std::optional<Tensor> make_workspace(int64_t floats, const Tensor& like) {
  if (floats == 0) return std::nullopt;
  return empty({floats}, torch::headeronly::ScalarType::Float, like);
}

inline float* data_of(const std::optional<Tensor>& workspace) {
  return workspace ? static_cast<float*>(workspace->mutable_data_ptr()) : nullptr;
}
#endif

}  // namespace difffast
