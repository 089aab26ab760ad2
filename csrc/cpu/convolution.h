// Convolutions of 3x3 pixels, stride 1, padding 1, by Winograd's minimal filtering (arXiv:1509.09308) on the CPU: m x m
// pixels of the result come from (m + 2)^2 products per pair of channels instead of 9 m^2.  Raw pointers only, so that
// it compiles and can be tested without PyTorch.  The caller splits [0, count) of each stage over its threads.
#pragma once

#include <cstdint>

#include "scalar.h"

namespace difffast {

struct Winograd {
  Scalar dtype;
  int64_t tile;  // m: 2 or 4
  int64_t batch, in_channels, out_channels, height, width;
  const void* x;        // [batch, in_channels, height, width] contiguous
  const void* weights;  // as transform_weights() leaves them, of `weight_channels` input channels
  const void* bias;     // [out_channels] or null
  void* out;            // [batch, out_channels, height, width] contiguous
  int64_t first_channel, weight_channels;  // x has the weights' channels from first_channel on
  const void* addend;                      // as out, is added to the result, and may be out itself; or null
  bool doubled;  // x is [batch, in_channels, height / 2, width / 2], and each of its pixels stands for 2x2
};

// Once per weight [out_channels, in_channels, 3, 3] contiguous: one item is one panel of output channels.  What the
// products read is float, or double for float64, and laid out for this processor.
int64_t transformed_size(Scalar dtype, int64_t tile, int64_t in_channels, int64_t out_channels);
int64_t panel_count(Scalar dtype, int64_t out_channels);
void transform_weights(Scalar dtype, int64_t tile, int64_t in_channels, int64_t out_channels, const void* weight, void* to,
                       int64_t begin, int64_t end);

// A convolution goes through rows of tiles, of all images, some at a time; each turn has these stages.
enum class Stage { kInput, kProducts, kOutput };
int64_t tile_rows(const Winograd& p);
int64_t rows_of_turn(const Winograd& p);
// Numbers of scratch for turns of `rows`: float, or double for float64.
int64_t scratch_size(const Winograd& p, int64_t rows);
int64_t item_count(const Winograd& p, Stage stage, int64_t rows);
void run_stage(const Winograd& p, Stage stage, int64_t first, int64_t rows, void* scratch, int64_t begin, int64_t end);

// Where weights are small and images large, each thread takes rows of tiles from x to the result on its own, so many at a
// time, and none waits for another; 0: all go through the stages together.
int64_t rows_alone(const Winograd& p, int64_t threads);
void run_alone(const Winograd& p, int64_t begin, int64_t end, int64_t rows);

}  // namespace difffast
