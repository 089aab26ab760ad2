// cross_attention on CUDA devices of compute capability 8.0 and later: the forward pass, in float16 and bfloat16.
// Raw pointers and a stream only, so that it compiles with nvcc alone; nothing here sees PyTorch.
#pragma once

#include <cstdint>

#include "launcher.h"

namespace difffast::cuda {

// Distances between neighbouring indices, in elements; the innermost one (along head_dim) is always 1.
struct CrossAttentionStrides {
  int64_t batch, head, row;
};

// out = softmax(scale * q k^T) v over at most 128 keys, for every (batch, head).
struct CrossAttentionArgs {
  const void* q;  // [batch, heads, queries, head_dim]
  const void* k;  // [batch / kv_repeats, heads, keys, head_dim]
  const void* v;  // [batch / kv_repeats, heads, keys, head_dim]
  void* out;      // [batch, heads, queries, head_dim]
  // [batch, queries, map_count] without gaps, or null: softmax probabilities of the chosen keys, mean over heads.
  float* maps;
  CrossAttentionStrides q_strides, k_strides, v_strides, out_strides;
  // Bit t % 64 of word t / 64: key t is in the map. Increasing keys take increasing columns of maps.
  uint64_t map_mask[2];
  int32_t batch, heads, queries, keys, head_dim;
  int32_t kv_repeats;  // row b of q reads row b / kv_repeats of k and v
  int32_t sink;        // further keys with logit 0 and value 0, present in the denominator only
  int32_t map_count;   // number of bits set in map_mask
  float scale;         // positive
  ElementType dtype;  // of q, k, v and out
};

// Why the kernel cannot take these arguments, as "requirement, got value"; null when it can. The text is the calling
// thread's own and lasts until its next call. Looks at the arguments only, never at a device.
const char* cross_attention_obstacle(const CrossAttentionArgs& args);

// The floats that `workspace` must have for these arguments on the current device, 0 where no sums of maps are left to
// add up: null, or the obstacle, or CUDA's error text.
const char* cross_attention_workspace(const CrossAttentionArgs& args, int64_t* floats);

// Enqueues the kernels on `stream` (a cudaStream_t of the current device) and returns without waiting for them: null,
// or the obstacle, or CUDA's error text. Same arguments and device, same bits: nothing is accumulated atomically. In
// which order heads are added up in a map depends on the batch and on the device.
const char* cross_attention_forward(const CrossAttentionArgs& args, float* workspace, void* stream);

}  // namespace difffast::cuda
