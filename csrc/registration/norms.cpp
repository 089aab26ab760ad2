#include <optional>
#include <tuple>
#include <vector>

#include "cpu/group_norm_silu.h"
#include "registration/tensors.h"

#ifdef DIFFFAST_WITH_CUDA
#include "cuda/group_norm_silu.h"
#endif

namespace difffast {
namespace {

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

void set_dtype(GroupNormSilu& p, const Tensor& x) { p.dtype = scalar_of(x); }
#ifdef DIFFFAST_WITH_CUDA
void set_dtype(cuda::GroupNormSilu& p, const Tensor& x) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float,
                  "the CUDA kernel takes float16, bfloat16 and float32");
  p.dtype = dtype == ScalarType::Half       ? cuda::ElementType::kFloat16
            : dtype == ScalarType::BFloat16 ? cuda::ElementType::kBFloat16
                                            : cuda::ElementType::kFloat32;
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

void run_norm(const GroupNormSilu& p, const Tensor& like) {
  if (p.batch == 0 || p.pixels == 0) return;
  // Threads only pay for themselves from some ten thousand numbers on.
  constexpr int64_t kEnough = 16384;
  if (!p.channels_last) {
    const int64_t grain = 1 + kEnough / (p.channels / p.groups * p.pixels);
    torch::stable::parallel_for(0, norm_groups(p), grain,
                                [&](int64_t begin, int64_t end) { norm_planes(p, begin, end); });
    return;
  }
  Tensor scratch = empty({norm_scratch_bytes(p)}, torch::headeronly::ScalarType::Byte, like);
  void* data = scratch.mutable_data_ptr();
  const int64_t blocks = norm_blocks(p), grain = 1 + kEnough * blocks / (p.batch * p.channels * p.pixels);
  torch::stable::parallel_for(0, blocks, grain,
                              [&](int64_t begin, int64_t end) { norm_moments(p, data, begin, end); });
  torch::stable::parallel_for(0, p.batch * p.groups, 1 + kEnough * p.groups / p.channels,
                              [&](int64_t begin, int64_t end) { norm_coefficients(p, data, begin, end); });
  torch::stable::parallel_for(0, blocks, grain,
                              [&](int64_t begin, int64_t end) { norm_pixels(p, data, begin, end); });
}

#ifdef DIFFFAST_WITH_CUDA
void run_norm(const cuda::GroupNormSilu& p, const Tensor& like) {
  if (p.batch == 0 || p.pixels == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  int64_t floats = 0;
  const char* error = cuda::group_norm_silu_workspace(p, &floats);
  STD_TORCH_CHECK(error == nullptr, "group_norm_silu on CUDA: ", error);
  const std::optional<Tensor> workspace = make_workspace(floats, like);
  error = cuda::group_norm_silu_forward(p, data_of(workspace), current_stream(like));
  STD_TORCH_CHECK(error == nullptr, "group_norm_silu on CUDA: ", error);
}
#endif

// Computes into `out`, or into a new tensor; `out` may be the input: no number is read after one in its place is written.
template <typename Norm>
Tensor compute_norm(const Tensor& input, int64_t groups, const Tensor& weight, const Tensor& bias, double eps,
                    std::optional<Tensor> addend, std::optional<Tensor> scale, std::optional<Tensor> shift, bool silu,
                    std::optional<Tensor> into) {
  check_norm(input, input.size(1), groups, weight, bias);
  const auto format = norm_format(input);
  const Tensor x = torch::stable::contiguous(input, format);
  const Tensor gain = torch::stable::contiguous(weight), offset = torch::stable::contiguous(bias);
  Norm p = norm_of<Norm>(x, x.size(1), groups, gain, offset, eps, silu, format);
  Tensor out = into ? *into : empty_norm(x, p.batch, p.channels, format);
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
Tensor group_norm_silu(const Tensor& x, int64_t groups, const Tensor& weight, const Tensor& bias, double eps,
                       std::optional<Tensor> addend, std::optional<Tensor> scale, std::optional<Tensor> shift,
                       bool silu) {
  return compute_norm<Norm>(x, groups, weight, bias, eps, addend, scale, shift, silu, std::nullopt);
}

// In the place of x, which must be dense in one of the two formats.
void group_norm_silu_in_place(const Tensor& x, int64_t groups, const Tensor& weight, const Tensor& bias, double eps,
                              std::optional<Tensor> addend, std::optional<Tensor> scale, std::optional<Tensor> shift,
                              bool silu) {
  STD_TORCH_CHECK(torch::stable::contiguous(x, norm_format(x)).const_data_ptr() == x.const_data_ptr(),
                  "x must be contiguous or channels_last");
  compute_norm<GroupNormSilu>(x, groups, weight, bias, eps, addend, scale, shift, silu, x);
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

}  // namespace
}  // namespace difffast

STABLE_TORCH_LIBRARY_IMPL(difffast, CPU, m) {
  m.impl("group_norm_silu.cpp", TORCH_BOX(&difffast::group_norm_silu<difffast::GroupNormSilu>));
  m.impl("group_norm_silu_.cpp", TORCH_BOX(&difffast::group_norm_silu_in_place));
  m.impl("skip_norm_silu.cpp", TORCH_BOX(&difffast::skip_norm_silu<difffast::GroupNormSilu>));
}

#ifdef DIFFFAST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(difffast, CUDA, m) {
  m.impl("group_norm_silu.cuda", TORCH_BOX(&difffast::group_norm_silu<difffast::cuda::GroupNormSilu>));
  m.impl("skip_norm_silu.cuda", TORCH_BOX(&difffast::skip_norm_silu<difffast::cuda::GroupNormSilu>));
}
#endif
