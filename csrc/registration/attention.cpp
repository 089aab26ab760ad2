#include <optional>
#include <tuple>
#include <vector>

#include "cpu/cross_attention.h"
#include "cpu/joint_attention.h"
#include "registration/tensors.h"

#ifdef DIFFFAST_WITH_CUDA
#include "cuda/cross_attention.h"
#endif

namespace difffast {
namespace {

void check_cross_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<int64_t>& map_tokens) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must be [batch, heads, rows, head_dim]");
  STD_TORCH_CHECK(repeats_of(q.size(0), k.size(0)) > 0 && k.size(1) == q.size(1) && k.size(3) == q.size(3) &&
                      have_equal_sizes(v, k),
                  "k and v must have equal sizes, q's heads and head_dim, and a batch that divides q's");
  STD_TORCH_CHECK(k.size(2) >= 1 && k.size(2) <= 128, "1 to 128 keys are supported, got ", k.size(2));
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "q, k and v must have one dtype");
  for (int64_t token : map_tokens) {
    STD_TORCH_CHECK(token >= 0 && token < k.size(2), "map_tokens must lie in 0 .. ", k.size(2) - 1, ", got ", token);
  }
}

// The sizes and operands of a call; `map_tokens` must outlive the result.
CrossAttention cross_attention_on_cpu(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                                int64_t sink, const std::vector<int64_t>& map_tokens, bool backward) {
  check_cross_attention(q, k, v, map_tokens);
  return {scalar_of(q), q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), repeats_of(q.size(0), k.size(0)), scale, sink,
          map_tokens.data(), static_cast<int64_t>(map_tokens.size()), backward, view(q), view(k), view(v)};
}

Tensor packed_keys(const CrossAttention& p, const Tensor& like) {
  Tensor packed = empty({packed_bytes(p)}, torch::headeronly::ScalarType::Byte, like);
  void* data = packed.mutable_data_ptr();
  torch::stable::parallel_for(0, p.batch / p.repeats * p.heads, 4, [&](int64_t begin, int64_t end) {
    pack_keys(p, data, begin, end);
  });
  return packed;
}

// Results of operands that are checked: out [batch, heads, queries, head_dim], and maps.
std::tuple<Tensor, Tensor> attend(const JointAttention& p, const Tensor& like) {
  const auto sums = p.dtype == Scalar::kFloat64 ? like.scalar_type() : torch::headeronly::ScalarType::Float;
  Tensor out = empty({p.batch, p.queries, p.heads, p.head_dim}, like.scalar_type(), like);
  Tensor maps = empty({p.batch, p.queries, p.map_count}, sums, like);
  if (out.numel() > 0) {
    void* maps_data = p.map_count > 0 ? maps.mutable_data_ptr() : nullptr;
    torch::stable::parallel_for(0, forward_count(p), 1, [&](int64_t begin, int64_t end) {
      forward(p, out.mutable_data_ptr(), maps_data, begin, end);
    });
  }
  return {torch::stable::transpose(out, 1, 2), maps};
}

std::tuple<Tensor, Tensor> cross_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t sink,
                                           std::vector<int64_t> map_tokens) {
  const CrossAttention p = cross_attention_on_cpu(q, k, v, scale, sink, map_tokens, false);
  if (sink == 0 && multiplies_in_tiles(p.dtype)) {  // the keys are those of a text alone
    const JointAttention in_tiles{p.dtype, p.batch,      p.heads,     p.queries, p.head_dim, p.keys, 0, p.repeats,
                                  scale,   p.map_tokens, p.map_count, p.q,       p.k,        p.v,    {}, {}};
    return attend(in_tiles, q);
  }
  const auto sums = p.dtype == Scalar::kFloat64 ? q.scalar_type() : torch::headeronly::ScalarType::Float;
  Tensor out = empty({p.batch, p.queries, p.heads, p.head_dim}, q.scalar_type(), q);
  Tensor maps = empty({p.batch, p.queries, p.map_count}, sums, q);
  if (out.numel() > 0) {
    const Tensor packed = packed_keys(p, q);
    void* maps_data = p.map_count > 0 ? maps.mutable_data_ptr() : nullptr;
    torch::stable::parallel_for(0, forward_count(p), 1, [&](int64_t begin, int64_t end) {
      forward(p, packed.const_data_ptr(), out.mutable_data_ptr(), maps_data, begin, end);
    });
  }
  return {torch::stable::transpose(out, 1, 2), maps};
}

std::tuple<Tensor, Tensor, Tensor> cross_attention_backward(
    std::optional<Tensor> grad_out, std::optional<Tensor> grad_maps, const Tensor& q, const Tensor& k, const Tensor& v,
    double scale, int64_t sink, std::vector<int64_t> map_tokens, bool need_q, bool need_kv) {
  const CrossAttention p = cross_attention_on_cpu(q, k, v, scale, sink, map_tokens, true);
  if (grad_out) {
    STD_TORCH_CHECK(have_equal_sizes(*grad_out, q) && grad_out->scalar_type() == q.scalar_type(),
                    "grad_out must have q's sizes and dtype");
  }
  if (grad_maps) {
    const auto sums = p.dtype == Scalar::kFloat64 ? q.scalar_type() : torch::headeronly::ScalarType::Float;
    STD_TORCH_CHECK(grad_maps->dim() == 3 && grad_maps->size(0) == p.batch && grad_maps->size(1) == p.queries &&
                        grad_maps->size(2) == p.map_count && grad_maps->scalar_type() == sums,
                    "grad_maps must be [batch, queries, map_tokens], in float32, or float64 where q is");
  }
  Tensor dq = need_q ? empty({p.batch, p.queries, p.heads, p.head_dim}, q.scalar_type(), q) : empty({0}, q.scalar_type(), q);
  const std::vector<int64_t> keys =
      need_kv ? std::vector<int64_t>(k.sizes().begin(), k.sizes().end()) : std::vector<int64_t>{0};
  Tensor dk = empty(keys, k.scalar_type(), k), dv = empty(keys, v.scalar_type(), v);

  CrossAttentionGradients g{};
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
      backward(p, g, packed.const_data_ptr(), begin, end);
    });
  } else {  // nothing attends to the keys
    torch::stable::zero_(dk);
    torch::stable::zero_(dv);
  }
  return {need_q ? torch::stable::transpose(dq, 1, 2) : dq, dk, dv};
}

// text_k and text_v may be null: there are pixels alone.
std::tuple<Tensor, Tensor> joint_attention_parts(const Tensor& q, const Tensor* text_k, const Tensor* text_v,
                                                 const Tensor& k, const Tensor& v, double scale,
                                                 const std::vector<int64_t>& map_tokens) {
  const auto fits = [&](const Tensor& x, const Tensor& like) {
    return x.dim() == 4 && have_equal_sizes(x, like) && x.size(1) == q.size(1) && x.size(3) == q.size(3) &&
           x.scalar_type() == q.scalar_type();
  };
  STD_TORCH_CHECK(q.dim() == 4, "q must be [batch, heads, rows, head_dim]");
  STD_TORCH_CHECK(fits(k, k) && fits(v, k) && k.size(0) == q.size(0),
                  "k and v must have equal sizes, and q's dtype, batch, heads and head_dim");
  JointAttention p{};
  p.dtype = scalar_of(q);
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.queries = q.size(2);
  p.head_dim = q.size(3);
  p.keys = k.size(2);
  p.repeats = 1;
  p.scale = scale;
  p.q = view(q);
  p.k = view(k);
  p.v = view(v);
  if (text_k) {
    p.repeats = repeats_of(q.size(0), text_k->size(0));
    STD_TORCH_CHECK(fits(*text_k, *text_k) && fits(*text_v, *text_k) && p.repeats > 0,
                    "text_k and text_v must have equal sizes, q's dtype, heads and head_dim, and a batch that divides q's");
    p.text_keys = text_k->size(2);
    p.text_k = view(*text_k);
    p.text_v = view(*text_v);
  }
  STD_TORCH_CHECK(p.text_keys + p.keys > 0, "at least one key is needed");
  for (int64_t token : map_tokens) {
    STD_TORCH_CHECK(token >= 0 && token < p.text_keys, "map_tokens must lie in 0 .. ", p.text_keys - 1, ", got ", token);
  }
  p.map_tokens = map_tokens.data();
  p.map_count = static_cast<int64_t>(map_tokens.size());
  return attend(p, q);
}

std::tuple<Tensor, Tensor> joint_attention(const Tensor& q, const Tensor& text_k, const Tensor& text_v, const Tensor& k,
                                           const Tensor& v, double scale, std::vector<int64_t> map_tokens) {
  return joint_attention_parts(q, &text_k, &text_v, k, v, scale, map_tokens);
}

Tensor self_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  return std::get<0>(joint_attention_parts(q, nullptr, nullptr, k, v, scale, {}));
}

#ifdef DIFFFAST_WITH_CUDA
cuda::CrossAttentionStrides outer_strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

std::tuple<Tensor, Tensor> cross_attention_on_cuda(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                                   int64_t sink, std::vector<int64_t> map_tokens) {
  using torch::headeronly::ScalarType;
  check_cross_attention(q, k, v, map_tokens);
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Half || q.scalar_type() == ScalarType::BFloat16,
                  "the CUDA kernel takes float16 and bfloat16");
  for (const Tensor* x : {&q, &k, &v}) STD_TORCH_CHECK(x->stride(3) == 1, "elements of a head must be neighbours");
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Tensor out = torch::stable::transpose(empty({q.size(0), q.size(2), q.size(1), q.size(3)}, q.scalar_type(), q), 1, 2);
  Tensor maps = empty({q.size(0), q.size(2), static_cast<int64_t>(map_tokens.size())}, ScalarType::Float, q);

  cuda::CrossAttentionArgs args{};
  args.q = q.const_data_ptr();
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.out = const_cast<void*>(out.const_data_ptr());
  args.maps = map_tokens.empty() ? nullptr : static_cast<float*>(maps.mutable_data_ptr());
  args.q_strides = outer_strides(q);
  args.k_strides = outer_strides(k);
  args.v_strides = outer_strides(v);
  args.out_strides = outer_strides(out);
  for (int64_t token : map_tokens) args.map_mask[token / 64] |= uint64_t{1} << token % 64;
  args.batch = static_cast<int32_t>(q.size(0));
  args.heads = static_cast<int32_t>(q.size(1));
  args.queries = static_cast<int32_t>(q.size(2));
  args.keys = static_cast<int32_t>(k.size(2));
  args.head_dim = static_cast<int32_t>(q.size(3));
  args.kv_repeats = static_cast<int32_t>(repeats_of(q.size(0), k.size(0)));
  args.sink = static_cast<int32_t>(sink);
  args.map_count = static_cast<int32_t>(map_tokens.size());
  args.scale = static_cast<float>(scale);
  args.dtype = q.scalar_type() == ScalarType::Half ? cuda::ElementType::kFloat16
                                                   : cuda::ElementType::kBFloat16;
  int64_t floats = 0;
  const char* error = cuda::cross_attention_workspace(args, &floats);
  STD_TORCH_CHECK(error == nullptr, "cross_attention on CUDA: ", error);
  const std::optional<Tensor> workspace = make_workspace(floats, q);
  error = cuda::cross_attention_forward(args, data_of(workspace), current_stream(q));
  STD_TORCH_CHECK(error == nullptr, "cross_attention on CUDA: ", error);
  return {out, maps};
}
#endif

}  // namespace
}  // namespace difffast

STABLE_TORCH_LIBRARY_IMPL(difffast, CPU, m) {
  m.impl("cross_attention.cpp", TORCH_BOX(&difffast::cross_attention));
  m.impl("cross_attention_backward.cpp", TORCH_BOX(&difffast::cross_attention_backward));
  m.impl("joint_attention.cpp", TORCH_BOX(&difffast::joint_attention));
  m.impl("self_attention.cpp", TORCH_BOX(&difffast::self_attention));
}

#ifdef DIFFFAST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(difffast, CUDA, m) {
  m.impl("cross_attention.cuda", TORCH_BOX(&difffast::cross_attention_on_cuda));
}
#endif
