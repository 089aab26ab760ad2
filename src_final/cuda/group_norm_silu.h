// group_norm_silu and skip_norm_silu on CUDA devices of compute capability 8.0 and later: the forward pass, in float16,
// bfloat16 and float32, with float32 statistics.
// Raw pointers and a stream only, so that it compiles with nvcc alone; nothing here sees PyTorch.
#pragma once

#include <cstdint>

#include "launcher.h"

namespace difffast::cuda {

// The norm's channels are those of x, then those of the skip, of which `repeats` neighbouring rows of x share one row.
// Channels up to `kept` (own rounded up to whole groups) go to out, the others, which do not depend on x, to shared.
// Without a skip: own = kept = channels.  All tensors dense: [batch, channels, pixels] or, if channels_last,
// [batch, pixels, channels]; at least one channel and one pixel.
struct GroupNormSilu {
  ElementType dtype;  // of all tensors
  bool channels_last, silu;
  int64_t batch, channels, pixels, groups;
  double eps;
  const void *weight, *bias;  // [channels]
  const void* x;              // own channels
  int64_t own, kept;
  const void* skip;  // channels - own of them, batch / repeats rows
  int64_t repeats;
  void* out;     // kept channels
  void* shared;  // channels - kept of them, batch / repeats rows
  // Without a skip only; null: none.
  const void* addend;  // batch / addend_repeats rows: as x, or [rows, channels]
  int64_t addend_repeats;
  bool addend_by_channel;
  const void *scale, *shift;  // [batch, channels]
};

// Channels that a group may have.
constexpr int kMaxGroupChannels = 2048;

// Why the kernel cannot take these arguments, as "requirement, got value"; null when it can. The text is the calling
// thread's own and lasts until its next call. Looks at the arguments only, never at a device.
const char* group_norm_silu_obstacle(const GroupNormSilu& args);

// The floats that `workspace` must have for these arguments on the current device, 0 where the pixels are read once:
// null, or the obstacle, or CUDA's error text.
const char* group_norm_silu_workspace(const GroupNormSilu& args, int64_t* floats);

// Enqueues the kernels on `stream` (a cudaStream_t of the current device) and returns without waiting for them: null,
// or the obstacle, or CUDA's error text. Same arguments and device, same bits: nothing is accumulated atomically. How
// sums are split depends on the batch and on the device.
const char* group_norm_silu_forward(const GroupNormSilu& args, float* workspace, void* stream);

}  // namespace difffast::cuda
