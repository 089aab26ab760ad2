#include <optional>

#include "cpu/convolution.h"
#include "registration/tensors.h"

namespace difffast {
namespace {

void check_tile(int64_t tile) { STD_TORCH_CHECK(tile == 2 || tile == 4, "tile must be 2 or 4, got ", tile); }

torch::headeronly::ScalarType dtype_of_sums(const Tensor& x) {
  return scalar_of(x) == Scalar::kFloat64 ? x.scalar_type() : torch::headeronly::ScalarType::Float;
}

Tensor winograd_weights(const Tensor& given, int64_t tile) {
  check_tile(tile);
  STD_TORCH_CHECK(given.dim() == 4 && given.size(2) == 3 && given.size(3) == 3, "weight must be [out, in, 3, 3]");
  const Tensor weight = torch::stable::contiguous(given);
  const Scalar dtype = scalar_of(weight);
  const int64_t out_channels = weight.size(0), in_channels = weight.size(1);
  Tensor out = empty({transformed_size(dtype, tile, in_channels, out_channels)}, dtype_of_sums(weight), weight);
  void* to = out.mutable_data_ptr();
  torch::stable::parallel_for(0, panel_count(dtype, out_channels), 1, [&](int64_t begin, int64_t end) {
    transform_weights(dtype, tile, in_channels, out_channels, weight.const_data_ptr(), to, begin, end);
  });
  return out;
}

// The problem of an input that is contiguous, without what lies in memory but for the input and the weights.
Winograd problem_of(const Tensor& x, const Tensor& weights, int64_t out_channels, int64_t tile, bool doubled,
                    int64_t first_channel, std::optional<int64_t> weight_channels) {
  check_tile(tile);
  STD_TORCH_CHECK(out_channels >= 1, "out_channels must be at least 1, got ", out_channels);
  Winograd p{};
  p.dtype = scalar_of(x);
  p.tile = tile;
  p.batch = x.size(0);
  p.in_channels = x.size(1);
  p.out_channels = out_channels;
  p.doubled = doubled;
  p.height = x.size(2) * (doubled ? 2 : 1);
  p.width = x.size(3) * (doubled ? 2 : 1);
  p.first_channel = first_channel;
  p.weight_channels = weight_channels.value_or(p.in_channels);
  STD_TORCH_CHECK(first_channel >= 0 && first_channel <= p.weight_channels - p.in_channels, "weights of ",
                  p.weight_channels, " channels have no ", p.in_channels, " from ", first_channel, " on");
  STD_TORCH_CHECK(weights.dim() == 1 && weights.is_contiguous() && weights.scalar_type() == dtype_of_sums(x) &&
                      weights.size(0) == transformed_size(p.dtype, tile, p.weight_channels, out_channels),
                  "weights must be what winograd_weights returns for these channels and x's dtype");
  p.x = x.const_data_ptr();
  p.weights = weights.const_data_ptr();
  return p;
}

Tensor contiguous_image(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) >= 1, "x must be [batch, channels, height, width]");
  return torch::stable::contiguous(x);
}

std::optional<Tensor> contiguous_bias(const std::optional<Tensor>& bias, const Tensor& x, int64_t out_channels) {
  if (!bias) return std::nullopt;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_channels && bias->scalar_type() == x.scalar_type(),
                  "bias must have one number of x's dtype per output channel");
  return torch::stable::contiguous(*bias);
}

void convolve(const Winograd& p, const Tensor& x) {
  const int64_t rows = tile_rows(p), turn = rows_of_turn(p), alone = rows_alone(p, torch::stable::get_num_threads());
  if (alone > 0) {
    torch::stable::parallel_for(0, (rows + alone - 1) / alone, 1, [&](int64_t begin, int64_t end) {
      run_alone(p, begin * alone, std::min(end * alone, rows), alone);
    });
    return;
  }
  Tensor scratch = empty({scratch_size(p, turn)}, dtype_of_sums(x), x);
  void* data = scratch.mutable_data_ptr();
  for (int64_t first = 0; first < rows; first += turn) {
    const int64_t count = std::min(turn, rows - first);
    for (const Stage stage : {Stage::kInput, Stage::kProducts, Stage::kOutput}) {
      torch::stable::parallel_for(0, item_count(p, stage, count), 1, [&](int64_t begin, int64_t end) {
        run_stage(p, stage, first, count, data, begin, end);
      });
    }
  }
}

Tensor winograd_convolution(const Tensor& input, const Tensor& weights, std::optional<Tensor> given, int64_t out_channels,
                            int64_t tile, int64_t first_channel, std::optional<int64_t> weight_channels, bool doubled) {
  const Tensor x = contiguous_image(input);
  Winograd p = problem_of(x, weights, out_channels, tile, doubled, first_channel, weight_channels);
  const std::optional<Tensor> bias = contiguous_bias(given, x, out_channels);
  if (bias) p.bias = bias->const_data_ptr();
  Tensor out = empty({p.batch, out_channels, p.height, p.width}, x.scalar_type(), x);
  if (out.numel() == 0) return out;
  p.out = out.mutable_data_ptr();
  convolve(p, x);
  return out;
}

// Into `out`, which is not x; the addend may be `out` itself.
void winograd_convolution_into(const Tensor& out, const Tensor& input, const Tensor& weights, std::optional<Tensor> given,
                               int64_t tile, const Tensor& addend) {
  const Tensor x = contiguous_image(input);
  STD_TORCH_CHECK(out.dim() == 4 && out.is_contiguous() && out.scalar_type() == x.scalar_type() &&
                      out.size(0) == x.size(0) && out.size(2) == x.size(2) && out.size(3) == x.size(3),
                  "out must be a contiguous result of x");
  STD_TORCH_CHECK(addend.sizes().vec() == out.sizes().vec() && addend.is_contiguous() &&
                      addend.scalar_type() == x.scalar_type(),
                  "addend must be as out");
  Winograd p = problem_of(x, weights, out.size(1), tile, false, 0, std::nullopt);
  const std::optional<Tensor> bias = contiguous_bias(given, x, p.out_channels);
  if (bias) p.bias = bias->const_data_ptr();
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(out.const_data_ptr() != x.const_data_ptr(), "out must not be x, which is read again");
  p.addend = addend.const_data_ptr();
  p.out = out.mutable_data_ptr();
  convolve(p, x);
}

}  // namespace
}  // namespace difffast

STABLE_TORCH_LIBRARY_IMPL(difffast, CPU, m) {
  m.impl("winograd_weights", TORCH_BOX(&difffast::winograd_weights));
  m.impl("winograd_convolution", TORCH_BOX(&difffast::winograd_convolution));
  m.impl("winograd_convolution_into", TORCH_BOX(&difffast::winograd_convolution_into));
}
