// The only file that sees PyTorch, and only through LibTorch's stable ABI: one build serves several PyTorch versions.
// Schemas are defined in difffast/ops (they exist without this library); here kernels are bound to them.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "cpu/repeat_batch.h"

namespace {

using torch::stable::Tensor;

// [B, C, H, W] stored as B, H, W, C without gaps.
bool is_channels_last(const Tensor& x) {
  if (x.dim() != 4) return false;
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  return x.stride(1) == 1 && x.stride(3) == c && x.stride(2) == w * c && x.stride(0) == h * w * c;
}

Tensor repeat_batch(const Tensor& input, int64_t repeats) {
  STD_TORCH_CHECK(repeats >= 1, "repeats must be at least 1, got ", repeats);
  STD_TORCH_CHECK(input.dim() >= 1, "x must have a batch dimension, got a 0-d tensor");

  const bool channels_last = !input.is_contiguous() && is_channels_last(input);
  const Tensor x = channels_last ? input : torch::stable::contiguous(input);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[0] *= repeats;
  const auto format = channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                    : torch::headeronly::MemoryFormat::Contiguous;
  Tensor out = torch::stable::empty(sizes, x.scalar_type(), std::nullopt, x.device(), std::nullopt, format);
  if (out.numel() == 0) return out;

  // In both formats a sample is one dense block of bytes.
  const int64_t row_bytes = x.numel() / x.size(0) * static_cast<int64_t>(x.element_size());
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  // Threads only pay for themselves from a few hundred KiB on.
  const int64_t grain = 1 + (int64_t{256} << 10) / row_bytes;
  torch::stable::parallel_for(0, sizes[0], grain, [&](int64_t begin, int64_t end) {
    difffast::repeat_batch_rows(from, to, row_bytes, repeats, begin, end);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(difffast, CPU, m) {
  m.impl("repeat_batch", TORCH_BOX(&repeat_batch));
}
