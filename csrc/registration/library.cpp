#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/instruction_set.h"
#include "cpu/repeat_batch.h"
#include "registration/tensors.h"

namespace difffast {
namespace {

Tensor repeat_batch(const Tensor& input, int64_t repeats) {
  STD_TORCH_CHECK(repeats >= 1, "repeats must be at least 1, got ", repeats);
  STD_TORCH_CHECK(input.dim() >= 1, "x must have a batch dimension, got a 0-d tensor");

  const bool channels_last = !input.is_contiguous() && is_channels_last(input);
  const Tensor x = channels_last ? input : torch::stable::contiguous(input);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const int64_t bytes = std::max<int64_t>(x.numel(), 1) * static_cast<int64_t>(x.element_size());
  STD_TORCH_CHECK(repeats <= std::numeric_limits<int64_t>::max() / bytes, "repeats must leave a size that 64 bits hold, got ",
                  repeats, " of ", bytes, " bytes");
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
    repeat_batch_rows(from, to, row_bytes, repeats, begin, end);
  });
  return out;
}

}  // namespace
}  // namespace difffast

// What the library was built with; read through ctypes.
extern "C" const char* difffast_instruction_set() { return difffast::instruction_set(); }
extern "C" int difffast_has_cuda() {
#ifdef DIFFFAST_WITH_CUDA
  return 1;
#else
  return 0;
#endif
}

STABLE_TORCH_LIBRARY_IMPL(difffast, CPU, m) { m.impl("repeat_batch", TORCH_BOX(&difffast::repeat_batch)); }
