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

Tensor winograd_convolution(const Tensor& input, const Tensor& weights, std::optional<Tensor> bias, int64_t out_channels,
                            int64_t tile, int64_t first_channel, std::optional<int64_t> weight_channels) {
  check_tile(tile);
  STD_TORCH_CHECK(input.dim() == 4 && input.size(1) >= 1, "x must be [batch, channels, height, width]");
  STD_TORCH_CHECK(out_channels >= 1, "out_channels must be at least 1, got ", out_channels);
  const Tensor x = torch::stable::contiguous(input);
  Winograd p{};
  p.dtype = scalar_of(x);
  p.tile = tile;
  p.batch = x.size(0);
  p.in_channels = x.size(1);
  p.out_channels = out_channels;
  p.height = x.size(2);
  p.width = x.size(3);
  p.first_channel = first_channel;
  p.weight_channels = weight_channels.value_or(p.in_channels);
  STD_TORCH_CHECK(first_channel >= 0 && first_channel <= p.weight_channels - p.in_channels, "weights of ",
                  p.weight_channels, " channels have no ", p.in_channels, " from ", first_channel, " on");
  STD_TORCH_CHECK(weights.dim() == 1 && weights.is_contiguous() && weights.scalar_type() == dtype_of_sums(x) &&
                      weights.size(0) == transformed_size(p.dtype, tile, p.weight_channels, out_channels),
                  "weights must be what winograd_weights returns for these channels and x's dtype");
  p.x = x.const_data_ptr();
  p.weights = weights.const_data_ptr();
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_channels && bias->scalar_type() == x.scalar_type(),
                    "bias must have one number of x's dtype per output channel");
    bias = torch::stable::contiguous(*bias);
    p.bias = bias->const_data_ptr();
  }
  Tensor out = empty({p.batch, out_channels, p.height, p.width}, x.scalar_type(), x);
  if (out.numel() == 0) return out;
  p.out = out.mutable_data_ptr();
  const int64_t rows = tile_rows(p), turn = rows_of_turn(p), alone = rows_alone(p, torch::stable::get_num_threads());
  if (alone > 0) {
    torch::stable::parallel_for(0, (rows + alone - 1) / alone, 1, [&](int64_t begin, int64_t end) {
      run_alone(p, begin * alone, std::min(end * alone, rows), alone);
    });
    return out;
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
  return out;
}

}  // namespace
}  // namespace difffast

STABLE_TORCH_LIBRARY_IMPL(difffast, CPU, m) {
  m.impl("winograd_weights", TORCH_BOX(&difffast::winograd_weights));
  m.impl("winograd_convolution", TORCH_BOX(&difffast::winograd_convolution));
}
