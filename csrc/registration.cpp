// The only file that sees PyTorch, and only through LibTorch's stable ABI: one build serves several PyTorch versions.
// Schemas are defined in difffast/ops (they exist without this library); here kernels are bound to them.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/cross_attention.h"
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

Tensor empty(std::vector<int64_t> sizes, torch::headeronly::ScalarType dtype, const Tensor& like) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::Contiguous);
}

difffast::View4 view(const Tensor& x) {
  return {x.const_data_ptr(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

// The sizes and operands of a call; `map_tokens` must outlive the result.
difffast::CrossAttention cross_attention_on_cpu(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                                int64_t sink, const std::vector<int64_t>& map_tokens) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must be [batch, heads, rows, head_dim]");
  STD_TORCH_CHECK(k.size(0) > 0 && q.size(0) % k.size(0) == 0 && k.size(1) == q.size(1) && k.size(3) == q.size(3) &&
                      v.sizes() == k.sizes(),
                  "k and v must have equal sizes, q's heads and head_dim, and a batch that divides q's");
  STD_TORCH_CHECK(k.size(2) >= 1 && k.size(2) <= 128, "1 to 128 keys are supported, got ", k.size(2));
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(k.scalar_type() == dtype && v.scalar_type() == dtype, "q, k and v must have one dtype");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16,
                  "the C++ kernel takes float32, float64 and bfloat16");
  for (int64_t token : map_tokens) {
    STD_TORCH_CHECK(token >= 0 && token < k.size(2), "map_tokens must lie in 0 .. ", k.size(2) - 1, ", got ", token);
  }
  const auto scalar = dtype == ScalarType::Float    ? difffast::Scalar::kFloat32
                      : dtype == ScalarType::Double ? difffast::Scalar::kFloat64
                                                    : difffast::Scalar::kBFloat16;
  return {scalar,    q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), q.size(0) / k.size(0), scale, sink,
          map_tokens.data(), static_cast<int64_t>(map_tokens.size()), view(q), view(k), view(v)};
}

Tensor packed_keys(const difffast::CrossAttention& p, const Tensor& like) {
  Tensor packed = empty({difffast::packed_bytes(p)}, torch::headeronly::ScalarType::Byte, like);
  void* data = packed.mutable_data_ptr();
  torch::stable::parallel_for(0, p.batch / p.repeats * p.heads, 4, [&](int64_t begin, int64_t end) {
    difffast::pack_keys(p, data, begin, end);
  });
  return packed;
}

std::tuple<Tensor, Tensor> cross_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t sink,
                                           std::vector<int64_t> map_tokens) {
  const difffast::CrossAttention p = cross_attention_on_cpu(q, k, v, scale, sink, map_tokens);
  const auto sums = p.dtype == difffast::Scalar::kFloat64 ? q.scalar_type() : torch::headeronly::ScalarType::Float;
  Tensor out = empty({p.batch, p.queries, p.heads, p.head_dim}, q.scalar_type(), q);
  Tensor maps = empty({p.batch, p.queries, p.map_count}, sums, q);
  if (out.numel() > 0) {
    const Tensor packed = packed_keys(p, q);
    void* maps_data = p.map_count > 0 ? maps.mutable_data_ptr() : nullptr;
    torch::stable::parallel_for(0, difffast::forward_count(p), 1, [&](int64_t begin, int64_t end) {
      difffast::forward(p, packed.const_data_ptr(), out.mutable_data_ptr(), maps_data, begin, end);
    });
  }
  return {torch::stable::transpose(out, 1, 2), maps};
}

std::tuple<Tensor, Tensor, Tensor> cross_attention_backward(
    std::optional<Tensor> grad_out, std::optional<Tensor> grad_maps, const Tensor& q, const Tensor& k, const Tensor& v,
    double scale, int64_t sink, std::vector<int64_t> map_tokens, bool need_q, bool need_kv) {
  const difffast::CrossAttention p = cross_attention_on_cpu(q, k, v, scale, sink, map_tokens);
  Tensor dq = need_q ? empty({p.batch, p.queries, p.heads, p.head_dim}, q.scalar_type(), q) : empty({0}, q.scalar_type(), q);
  const std::vector<int64_t> keys =
      need_kv ? std::vector<int64_t>(k.sizes().begin(), k.sizes().end()) : std::vector<int64_t>{0};
  Tensor dk = empty(keys, k.scalar_type(), k), dv = empty(keys, v.scalar_type(), v);

  difffast::CrossAttentionGradients g{};
  std::optional<Tensor> maps;
  if (grad_out) g.out = view(*grad_out);
  if (grad_maps && p.map_count > 0) {
    maps = torch::stable::contiguous(*grad_maps);
    g.maps = maps->const_data_ptr();
  }
  g.q = need_q ? dq.mutable_data_ptr() : nullptr;
  g.k = need_kv ? dk.mutable_data_ptr() : nullptr;
  g.v = need_kv ? dv.mutable_data_ptr() : nullptr;
  if (p.batch > 0) {
    const Tensor packed = packed_keys(p, q);
    torch::stable::parallel_for(0, p.batch / p.repeats * p.heads, 1, [&](int64_t begin, int64_t end) {
      difffast::backward(p, g, packed.const_data_ptr(), begin, end);
    });
  }
  return {need_q ? torch::stable::transpose(dq, 1, 2) : dq, dk, dv};
}

}  // namespace

// What the library was built with; read through ctypes.
extern "C" const char* difffast_instruction_set() { return difffast::instruction_set(); }
extern "C" int difffast_has_cuda() {
#ifdef DIFFFAST_WITH_CUDA
  return 1;
#else
  return 0;
#endif
}

STABLE_TORCH_LIBRARY_IMPL(difffast, CPU, m) {
  m.impl("repeat_batch", TORCH_BOX(&repeat_batch));
  m.impl("cross_attention.cpp", TORCH_BOX(&cross_attention));
  m.impl("cross_attention_backward.cpp", TORCH_BOX(&cross_attention_backward));
}
