#include "convolution.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "instruction_set.h"

namespace difffast {
namespace {

#define DIFFFAST_KERNELS "convolution_kernel.h"
#include "every_set.h"

// Scratch of one turn: what the products read and write is to stay in a cache that several cores share, and below the
// size from which on the C library gives memory back at once, and has to clear it page by page for the next turn.
constexpr int64_t kTurnBytes = int64_t{24} << 20;
// Up to so many bytes of weights may be read anew for every few rows, whose scratch is to stay in a core's own cache.
constexpr int64_t kSmallWeights = int64_t{4} << 20, kAloneBytes = int64_t{512} << 10;
// Each thread needs so many rows, lest one that has a row more than others keep them waiting for long.
constexpr int64_t kRowsPerThread = 4;

// What is laid out depends on the length of a vector, and with it on the instruction set.
template <class T>
int64_t width_of_panel() {
  DIFFFAST_BY_SET(panel_width<T>)
}

template <class T>
int64_t scratch_numbers(const Winograd& p, int64_t rows) {
  DIFFFAST_BY_SET(scratch_of<T>(p, rows))
}

template <class T>
int64_t count_items(const Winograd& p, Stage stage, int64_t rows) {
  DIFFFAST_BY_SET(items_of<T>(p, stage, rows))
}

template <class S>
void run(const Winograd& p, Stage stage, int64_t first, int64_t rows, void* scratch, int64_t begin, int64_t end) {
  DIFFFAST_BY_SET(stage_of<S>(p, stage, first, rows, scratch, begin, end))
}

template <class S>
void transform(int64_t tile, int64_t in_channels, int64_t out_channels, const void* weight, void* to, int64_t begin,
               int64_t end) {
  DIFFFAST_BY_SET(weights_of<S>(tile, in_channels, out_channels, weight, to, begin, end))
}

}  // namespace

int64_t panel_count(Scalar dtype, int64_t out_channels) {
  const int64_t width = dtype == Scalar::kFloat64 ? width_of_panel<double>() : width_of_panel<float>();
  return (out_channels + width - 1) / width;
}

int64_t transformed_size(Scalar dtype, int64_t tile, int64_t in_channels, int64_t out_channels) {
  const int64_t width = dtype == Scalar::kFloat64 ? width_of_panel<double>() : width_of_panel<float>();
  return panel_count(dtype, out_channels) * (tile + 2) * (tile + 2) * in_channels * width;
}

void transform_weights(Scalar dtype, int64_t tile, int64_t in_channels, int64_t out_channels, const void* weight, void* to,
                       int64_t begin, int64_t end) {
  switch (dtype) {
    case Scalar::kFloat32: return transform<float>(tile, in_channels, out_channels, weight, to, begin, end);
    case Scalar::kFloat64: return transform<double>(tile, in_channels, out_channels, weight, to, begin, end);
    case Scalar::kBFloat16: return transform<BFloat16>(tile, in_channels, out_channels, weight, to, begin, end);
  }
}

int64_t tile_rows(const Winograd& p) { return p.batch * ((p.height + p.tile - 1) / p.tile); }

int64_t rows_of_turn(const Winograd& p) {
  const int64_t rows = tile_rows(p), most = std::max<int64_t>(1, kTurnBytes / (scratch_size(p, 1) * compute_size(p.dtype)));
  const int64_t turns = (rows + most - 1) / most;
  return (rows + turns - 1) / turns;
}

int64_t rows_alone(const Winograd& p, int64_t threads) {
  const int64_t rows = tile_rows(p), size = compute_size(p.dtype);
  if (rows < kRowsPerThread * threads) return 0;
  if (transformed_size(p.dtype, p.tile, p.in_channels, p.out_channels) * size > kSmallWeights) return 0;
  const int64_t most = std::max<int64_t>(1, kAloneBytes / (scratch_size(p, 1) * size));
  return std::min(most, rows / (kRowsPerThread * threads));
}

void run_alone(const Winograd& p, int64_t begin, int64_t end, int64_t rows) {
  constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(void* data) const { ::operator delete(data, kLine); }
  };
  const std::unique_ptr<void, Free> scratch(::operator new(scratch_size(p, rows) * compute_size(p.dtype), kLine));
  for (int64_t first = begin; first < end; first += rows) {
    const int64_t count = std::min(rows, end - first);
    for (const Stage stage : {Stage::kInput, Stage::kProducts, Stage::kOutput}) {
      run_stage(p, stage, first, count, scratch.get(), 0, item_count(p, stage, count));
    }
  }
}

int64_t scratch_size(const Winograd& p, int64_t rows) {
  return p.dtype == Scalar::kFloat64 ? scratch_numbers<double>(p, rows) : scratch_numbers<float>(p, rows);
}

int64_t item_count(const Winograd& p, Stage stage, int64_t rows) {
  return p.dtype == Scalar::kFloat64 ? count_items<double>(p, stage, rows) : count_items<float>(p, stage, rows);
}

void run_stage(const Winograd& p, Stage stage, int64_t first, int64_t rows, void* scratch, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Scalar::kFloat32: return run<float>(p, stage, first, rows, scratch, begin, end);
    case Scalar::kFloat64: return run<double>(p, stage, first, rows, scratch, begin, end);
    case Scalar::kBFloat16: return run<BFloat16>(p, stage, first, rows, scratch, begin, end);
  }
}

}  // namespace difffast
