// The only file that sees PyTorch, and only through LibTorch's stable ABI: one build serves several PyTorch versions.
// Schemas are defined in difffast/ops (they exist without this library); here kernels are bound to them.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#ifdef DIFFFAST_WITH_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/cross_attention.h"
#include "cuda/group_norm_silu.h"
#endif

#include "cpu/attention_entropy.h"
#include "cpu/cross_attention.h"
#include "cpu/group_norm_silu.h"
#include "cpu/instruction_set.h"
#include "cpu/joint_attention.h"
#include "cpu/repeat_batch.h"

namespace {

using torch::stable::Tensor;

// By hand: in PyTorch 2.10 the stable ABI's lists of sizes cannot be compared.
bool have_equal_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

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

// How many neighbours in a batch of `rows` share one of `given` rows; 0: they cannot.
int64_t repeats_of(int64_t rows, int64_t given) {
  if (given == 0) return rows == 0 ? 1 : 0;
  return rows % given == 0 ? std::max<int64_t>(1, rows / given) : 0;
}

difffast::Scalar scalar_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16,
                  "the C++ kernel takes float32, float64 and bfloat16");
  return dtype == ScalarType::Float    ? difffast::Scalar::kFloat32
         : dtype == ScalarType::Double ? difffast::Scalar::kFloat64
                                       : difffast::Scalar::kBFloat16;
}

difffast::View4 view(const Tensor& x) {
  return {x.const_data_ptr(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

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
difffast::CrossAttention cross_attention_on_cpu(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                                int64_t sink, const std::vector<int64_t>& map_tokens, bool backward) {
  check_cross_attention(q, k, v, map_tokens);
  return {scalar_of(q), q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), repeats_of(q.size(0), k.size(0)), scale, sink,
          map_tokens.data(), static_cast<int64_t>(map_tokens.size()), backward, view(q), view(k), view(v)};
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
  const difffast::CrossAttention p = cross_attention_on_cpu(q, k, v, scale, sink, map_tokens, false);
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
  const difffast::CrossAttention p = cross_attention_on_cpu(q, k, v, scale, sink, map_tokens, true);
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
  difffast::JointAttention p{};
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

  const auto sums = p.dtype == difffast::Scalar::kFloat64 ? q.scalar_type() : torch::headeronly::ScalarType::Float;
  Tensor out = empty({p.batch, p.queries, p.heads, p.head_dim}, q.scalar_type(), q);
  Tensor maps = empty({p.batch, p.queries, p.map_count}, sums, q);
  if (out.numel() > 0) {
    Tensor packed = empty({difffast::packed_bytes(p)}, torch::headeronly::ScalarType::Byte, q);
    void* packed_data = packed.mutable_data_ptr();
    torch::stable::parallel_for(0, difffast::pack_count(p), 4, [&](int64_t begin, int64_t end) {
      difffast::pack_keys(p, packed_data, begin, end);
    });
    void* maps_data = p.map_count > 0 ? maps.mutable_data_ptr() : nullptr;
    torch::stable::parallel_for(0, difffast::forward_count(p), 1, [&](int64_t begin, int64_t end) {
      difffast::forward(p, packed_data, out.mutable_data_ptr(), maps_data, begin, end);
    });
  }
  return {torch::stable::transpose(out, 1, 2), maps};
}

std::tuple<Tensor, Tensor> joint_attention(const Tensor& q, const Tensor& text_k, const Tensor& text_v, const Tensor& k,
                                           const Tensor& v, double scale, std::vector<int64_t> map_tokens) {
  return joint_attention_parts(q, &text_k, &text_v, k, v, scale, map_tokens);
}

Tensor self_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  return std::get<0>(joint_attention_parts(q, nullptr, nullptr, k, v, scale, {}));
}

// The sizes and operands of a call; `anchors` must outlive the result.
difffast::AttentionEntropy attention_entropy_on_cpu(const Tensor& maps, const std::vector<int64_t>& anchors,
                                                    int64_t n_tokens, double tau, double eps, double weight,
                                                    bool detach_min) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(maps.dim() == 3 && maps.size(1) >= 1, "maps must be [batch, pixels, columns] with pixels >= 1");
  const ScalarType dtype = maps.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "the kernel takes float32 and float64");
  STD_TORCH_CHECK(n_tokens >= 1 && n_tokens < maps.size(2), "n_tokens must lie in 1 .. ", maps.size(2) - 1, ", got ",
                  n_tokens);
  STD_TORCH_CHECK(!anchors.empty(), "at least one anchor is needed");
  int64_t previous = 0;
  for (int64_t anchor : anchors) {
    STD_TORCH_CHECK(anchor > previous && anchor <= n_tokens, "anchors must increase within 1 .. ", n_tokens, ", got ",
                    anchor, " after ", previous);
    previous = anchor;
  }
  return {dtype == ScalarType::Double,
          maps.size(0),
          maps.size(1),
          maps.size(2),
          n_tokens,
          anchors.data(),
          static_cast<int64_t>(anchors.size()),
          tau,
          eps,
          weight,
          detach_min,
          maps.const_data_ptr(),
          {maps.stride(0), maps.stride(1), maps.stride(2)}};
}

// Blocks of a thread, at least: with fewer it would cost more than it saves.
int64_t entropy_grain(const difffast::AttentionEntropy& p) { return 1 + 1024 / p.tokens; }

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_entropy(const Tensor& maps, std::vector<int64_t> anchors,
                                                             int64_t n_tokens, double tau, double eps, double weight,
                                                             bool detach_min) {
  const difffast::AttentionEntropy p = attention_entropy_on_cpu(maps, anchors, n_tokens, tau, eps, weight, detach_min);
  Tensor loss = empty({p.batch}, maps.scalar_type(), maps);
  Tensor shares = empty({p.batch, p.subjects, p.pixels}, maps.scalar_type(), maps);
  Tensor stats = empty({p.batch, p.subjects, difffast::kEntropyStats}, maps.scalar_type(), maps);
  Tensor argmin = empty({p.batch, p.subjects}, torch::headeronly::ScalarType::Long, maps);
  void *shares_data = shares.mutable_data_ptr(), *stats_data = stats.mutable_data_ptr();
  int64_t* argmin_data = static_cast<int64_t*>(argmin.mutable_data_ptr());
  torch::stable::parallel_for(0, difffast::entropy_blocks(p), entropy_grain(p), [&](int64_t begin, int64_t end) {
    difffast::entropy_columns(p, shares_data, begin, end);
  });
  torch::stable::parallel_for(0, p.batch * p.subjects, 1 + 4096 / p.pixels, [&](int64_t begin, int64_t end) {
    difffast::entropy_sums(p, shares_data, stats_data, argmin_data, begin, end);
  });
  difffast::entropy_loss(p, stats_data, loss.mutable_data_ptr(), 0, p.batch);
  return {loss, shares, stats, argmin};
}

Tensor attention_entropy_backward(const Tensor& grad_loss, const Tensor& maps, const Tensor& shares,
                                  const Tensor& stats, const Tensor& argmin, std::vector<int64_t> anchors,
                                  int64_t n_tokens, double tau, double eps, double weight) {
  const difffast::AttentionEntropy p = attention_entropy_on_cpu(maps, anchors, n_tokens, tau, eps, weight, false);
  const auto saved = [&](const Tensor& x, const std::vector<int64_t>& sizes, torch::headeronly::ScalarType dtype) {
    STD_TORCH_CHECK(x.sizes().vec() == sizes && x.scalar_type() == dtype,
                    "the forward pass has other outputs for these maps");
    return torch::stable::contiguous(x);
  };
  const auto dtype = maps.scalar_type();
  const Tensor grad = saved(grad_loss, {p.batch}, dtype);
  const Tensor p_of = saved(shares, {p.batch, p.subjects, p.pixels}, dtype);
  const Tensor sums = saved(stats, {p.batch, p.subjects, difffast::kEntropyStats}, dtype);
  const Tensor lowest = saved(argmin, {p.batch, p.subjects}, torch::headeronly::ScalarType::Long);
  Tensor out = empty({p.batch, p.pixels, p.columns}, maps.scalar_type(), maps);
  const difffast::AttentionEntropyGradient g{grad.const_data_ptr(), p_of.const_data_ptr(), sums.const_data_ptr(),
                                             static_cast<const int64_t*>(lowest.const_data_ptr()),
                                             out.mutable_data_ptr()};
  torch::stable::parallel_for(0, difffast::entropy_blocks(p), entropy_grain(p),
                              [&](int64_t begin, int64_t end) { difffast::entropy_backward(p, g, begin, end); });
  return out;
}

// The format of the results for this operand: channels_last where its channels are neighbours.
torch::headeronly::MemoryFormat norm_format(const Tensor& x) {
  return x.dim() == 4 && x.stride(1) == 1 && !x.is_contiguous() ? torch::headeronly::MemoryFormat::ChannelsLast
                                                                : torch::headeronly::MemoryFormat::Contiguous;
}

Tensor empty_norm(const Tensor& x, int64_t rows, int64_t channels, torch::headeronly::MemoryFormat format) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[0] = rows;
  sizes[1] = channels;
  return torch::stable::empty(sizes, x.scalar_type(), std::nullopt, x.device(), std::nullopt, format);
}

void set_dtype(difffast::GroupNormSilu& p, const Tensor& x) { p.dtype = scalar_of(x); }
#ifdef DIFFFAST_WITH_CUDA
void set_dtype(difffast::cuda::GroupNormSilu& p, const Tensor& x) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float,
                  "the CUDA kernel takes float16, bfloat16 and float32");
  p.dtype = dtype == ScalarType::Half       ? difffast::cuda::ElementType::kFloat16
            : dtype == ScalarType::BFloat16 ? difffast::cuda::ElementType::kBFloat16
                                            : difffast::cuda::ElementType::kFloat32;
}
#endif

// What both norms have in common, for either device; x must have the format, and `channels` contains those of a skip.
template <typename Norm>
Norm norm_of(const Tensor& x, int64_t channels, int64_t groups, const Tensor& weight, const Tensor& bias, double eps,
             bool silu, torch::headeronly::MemoryFormat format) {
  Norm p{};
  set_dtype(p, x);
  p.channels_last = format == torch::headeronly::MemoryFormat::ChannelsLast;
  p.silu = silu;
  p.batch = x.size(0);
  p.channels = channels;
  p.pixels = x.dim() == 4 ? x.size(2) * x.size(3) : x.size(2);
  p.groups = groups;
  p.eps = eps;
  p.weight = weight.const_data_ptr();
  p.bias = bias.const_data_ptr();
  p.x = x.const_data_ptr();
  p.own = p.kept = x.size(1);
  p.repeats = p.addend_repeats = 1;
  return p;
}

void check_norm(const Tensor& x, int64_t channels, int64_t groups, const Tensor& weight, const Tensor& bias) {
  STD_TORCH_CHECK(x.dim() == 3 || x.dim() == 4, "x must be [batch, channels, pixels] or [batch, channels, H, W]");
  STD_TORCH_CHECK(groups >= 1 && channels >= 1 && channels % groups == 0, "groups must divide channels, got ", groups,
                  " and ", channels);
  for (const Tensor* of : {&weight, &bias}) {
    STD_TORCH_CHECK(of->dim() == 1 && of->size(0) == channels && of->scalar_type() == x.scalar_type(),
                    "weight and bias must have one number of x's dtype per channel");
  }
}

void run_norm(const difffast::GroupNormSilu& p, const Tensor& like) {
  if (p.batch == 0 || p.pixels == 0) return;
  // Threads only pay for themselves from some ten thousand numbers on.
  constexpr int64_t kEnough = 16384;
  if (!p.channels_last) {
    const int64_t grain = 1 + kEnough / (p.channels / p.groups * p.pixels);
    torch::stable::parallel_for(0, difffast::norm_groups(p), grain,
                                [&](int64_t begin, int64_t end) { difffast::norm_planes(p, begin, end); });
    return;
  }
  Tensor scratch = empty({difffast::norm_scratch_bytes(p)}, torch::headeronly::ScalarType::Byte, like);
  void* data = scratch.mutable_data_ptr();
  const int64_t blocks = difffast::norm_blocks(p), grain = 1 + kEnough * blocks / (p.batch * p.channels * p.pixels);
  torch::stable::parallel_for(0, blocks, grain,
                              [&](int64_t begin, int64_t end) { difffast::norm_moments(p, data, begin, end); });
  torch::stable::parallel_for(0, p.batch * p.groups, 1 + kEnough * p.groups / p.channels,
                              [&](int64_t begin, int64_t end) { difffast::norm_coefficients(p, data, begin, end); });
  torch::stable::parallel_for(0, blocks, grain,
                              [&](int64_t begin, int64_t end) { difffast::norm_pixels(p, data, begin, end); });
}

#ifdef DIFFFAST_WITH_CUDA
void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

// None where none is needed: an empty tensor costs a call as well.
std::optional<Tensor> make_workspace(int64_t floats, const Tensor& like) {
  if (floats == 0) return std::nullopt;
  return empty({floats}, torch::headeronly::ScalarType::Float, like);
}

float* data_of(const std::optional<Tensor>& workspace) {
  return workspace ? static_cast<float*>(workspace->mutable_data_ptr()) : nullptr;
}

void run_norm(const difffast::cuda::GroupNormSilu& p, const Tensor& like) {
  if (p.batch == 0 || p.pixels == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  int64_t floats = 0;
  const char* error = difffast::cuda::group_norm_silu_workspace(p, &floats);
  STD_TORCH_CHECK(error == nullptr, "group_norm_silu on CUDA: ", error);
  const std::optional<Tensor> workspace = make_workspace(floats, like);
  error = difffast::cuda::group_norm_silu_forward(p, data_of(workspace), current_stream(like));
  STD_TORCH_CHECK(error == nullptr, "group_norm_silu on CUDA: ", error);
}
#endif

template <typename Norm>
Tensor group_norm_silu(const Tensor& input, int64_t groups, const Tensor& weight, const Tensor& bias, double eps,
                       std::optional<Tensor> addend, std::optional<Tensor> scale, std::optional<Tensor> shift,
                       bool silu) {
  check_norm(input, input.size(1), groups, weight, bias);
  const auto format = norm_format(input);
  const Tensor x = torch::stable::contiguous(input, format);
  const Tensor gain = torch::stable::contiguous(weight), offset = torch::stable::contiguous(bias);
  Norm p = norm_of<Norm>(x, x.size(1), groups, gain, offset, eps, silu, format);
  Tensor out = empty_norm(x, p.batch, p.channels, format);
  p.out = out.mutable_data_ptr();
  if (addend) {
    const int64_t rows = addend->size(0);
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes[0] = rows;
    p.addend_by_channel = addend->dim() == 2;
    if (p.addend_by_channel) sizes.resize(2);
    STD_TORCH_CHECK(addend->sizes().vec() == sizes && addend->scalar_type() == x.scalar_type() &&
                        (rows == p.batch || (rows > 0 && p.batch % rows == 0)),
                    "addend must be [rows, channels] or as x but for the rows, which divide x's");
    addend = p.addend_by_channel ? torch::stable::contiguous(*addend) : torch::stable::contiguous(*addend, format);
    p.addend = addend->const_data_ptr();
    p.addend_repeats = rows > 0 ? p.batch / rows : 1;
  }
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "scale and shift must be given together");
  if (scale) {
    for (std::optional<Tensor>* of : {&scale, &shift}) {
      STD_TORCH_CHECK((*of)->dim() == 2 && (*of)->size(0) == p.batch && (*of)->size(1) == p.channels &&
                          (*of)->scalar_type() == x.scalar_type(),
                      "scale and shift must be [batch, channels] in x's dtype");
      *of = torch::stable::contiguous(**of);
    }
    p.scale = scale->const_data_ptr();
    p.shift = shift->const_data_ptr();
  }
  run_norm(p, x);
  return out;
}

template <typename Norm>
std::tuple<Tensor, Tensor> skip_norm_silu(const Tensor& hidden, const Tensor& skip, int64_t groups,
                                          const Tensor& weight, const Tensor& bias, double eps, bool silu) {
  STD_TORCH_CHECK(skip.dim() == hidden.dim() && skip.scalar_type() == hidden.scalar_type() && hidden.size(1) >= 1 &&
                      skip.size(1) >= 1,
                  "hidden and skip must have the same rank and dtype, and channels");
  const int64_t channels = hidden.size(1) + skip.size(1), rows = skip.size(0);
  check_norm(hidden, channels, groups, weight, bias);
  for (int64_t i = 2; i < hidden.dim(); ++i) {
    STD_TORCH_CHECK(hidden.size(i) == skip.size(i), "hidden and skip must have the same pixels");
  }
  const int64_t repeats = repeats_of(hidden.size(0), rows);
  STD_TORCH_CHECK(repeats > 0 && (rows == 0) == (hidden.size(0) == 0), "skip's batch must divide hidden's, got ", rows,
                  " and ", hidden.size(0));
  const auto format = norm_format(hidden);
  const Tensor x = torch::stable::contiguous(hidden, format), more = torch::stable::contiguous(skip, format);
  const Tensor gain = torch::stable::contiguous(weight), offset = torch::stable::contiguous(bias);
  Norm p = norm_of<Norm>(x, channels, groups, gain, offset, eps, silu, format);
  const int64_t size = channels / groups;
  p.kept = (p.own + size - 1) / size * size;
  p.skip = more.const_data_ptr();
  p.repeats = repeats;
  Tensor out = empty_norm(x, p.batch, p.kept, format), shared = empty_norm(x, rows, channels - p.kept, format);
  p.out = out.mutable_data_ptr();
  p.shared = shared.mutable_data_ptr();
  run_norm(p, x);
  return {out, shared};
}

#ifdef DIFFFAST_WITH_CUDA
difffast::cuda::CrossAttentionStrides outer_strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

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

  difffast::cuda::CrossAttentionArgs args{};
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
  args.dtype = q.scalar_type() == ScalarType::Half ? difffast::cuda::ElementType::kFloat16
                                                   : difffast::cuda::ElementType::kBFloat16;
  int64_t floats = 0;
  const char* error = difffast::cuda::cross_attention_workspace(args, &floats);
  STD_TORCH_CHECK(error == nullptr, "cross_attention on CUDA: ", error);
  const std::optional<Tensor> workspace = make_workspace(floats, q);
  error = difffast::cuda::cross_attention_forward(args, data_of(workspace), current_stream(q));
  STD_TORCH_CHECK(error == nullptr, "cross_attention on CUDA: ", error);
  return {out, maps};
}
#endif

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
  m.impl("attention_entropy.cpp", TORCH_BOX(&attention_entropy));
  m.impl("attention_entropy_backward.cpp", TORCH_BOX(&attention_entropy_backward));
  m.impl("cross_attention.cpp", TORCH_BOX(&cross_attention));
  m.impl("cross_attention_backward.cpp", TORCH_BOX(&cross_attention_backward));
  m.impl("group_norm_silu.cpp", TORCH_BOX(&group_norm_silu<difffast::GroupNormSilu>));
  m.impl("joint_attention.cpp", TORCH_BOX(&joint_attention));
  m.impl("self_attention.cpp", TORCH_BOX(&self_attention));
  m.impl("skip_norm_silu.cpp", TORCH_BOX(&skip_norm_silu<difffast::GroupNormSilu>));
}

#ifdef DIFFFAST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(difffast, CUDA, m) {
  m.impl("cross_attention.cuda", TORCH_BOX(&cross_attention_on_cuda));
  m.impl("group_norm_silu.cuda", TORCH_BOX(&group_norm_silu<difffast::cuda::GroupNormSilu>));
  m.impl("skip_norm_silu.cuda", TORCH_BOX(&skip_norm_silu<difffast::cuda::GroupNormSilu>));
}
#endif
