#include <vector>

#include "cpu/geglu.h"
#include "registration/tensors.h"

namespace difffast {
namespace {

Tensor geglu(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() >= 1 && input.size(input.dim() - 1) % 2 == 0, "x must have an even last dimension");
  const Tensor x = torch::stable::contiguous(input);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  Geglu p{};
  p.dtype = scalar_of(x);
  p.channels = sizes.back() /= 2;
  Tensor out = empty(sizes, x.scalar_type(), x);
  if (out.numel() == 0) return out;
  p.x = x.const_data_ptr();
  p.out = out.mutable_data_ptr();
  // Threads only pay for themselves from some ten thousand numbers on.
  const int64_t grain = 1 + 8192 / p.channels;
  torch::stable::parallel_for(0, out.numel() / p.channels, grain,
                              [&](int64_t begin, int64_t end) { geglu_rows(p, begin, end); });
  return out;
}

}  // namespace
}  // namespace difffast

STABLE_TORCH_LIBRARY_IMPL(difffast, CPU, m) { m.impl("geglu.cpp", TORCH_BOX(&difffast::geglu)); }
