#include "cpu/fingerprint.h"

#include <atomic>

#include "registration/tensors.h"

namespace difffast {
namespace {

struct Part {
  const char* data;
  int64_t size;
};

int64_t fingerprint_of(std::vector<Tensor> tensors) {
  std::vector<Part> parts;
  for (const Tensor& x : tensors) {
    STD_TORCH_CHECK(x.is_contiguous(), "tensors must be contiguous");
    const char* data = static_cast<const char*>(x.const_data_ptr());
    const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
    for (int64_t at = 0; at < bytes; at += kFingerprintPart)
      parts.push_back({data + at, std::min(kFingerprintPart, bytes - at)});
  }
  std::atomic<uint64_t> sum{0};
  torch::stable::parallel_for(0, static_cast<int64_t>(parts.size()), 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sum += fingerprint(parts[i].data, parts[i].size, static_cast<uint64_t>(i));
  });
  return static_cast<int64_t>(sum.load());
}

}  // namespace
}  // namespace difffast

STABLE_TORCH_LIBRARY_IMPL(difffast, CPU, m) { m.impl("fingerprint", TORCH_BOX(&difffast::fingerprint_of)); }
