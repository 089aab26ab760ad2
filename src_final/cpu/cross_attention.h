// cross_attention on the CPU; raw pointers only, so that it compiles and can be tested without PyTorch.
// The caller splits [0, count) of each stage over its threads; stages run one after the other.
#pragma once

#include <cstdint>

#include "scalar.h"
#include "view4.h"

namespace difffast {

struct CrossAttention {
  Scalar dtype;
  int64_t batch, heads, queries, keys, head_dim;
  int64_t repeats;  // queries' row b uses row b / repeats of k and v
  double scale;
  int64_t sink;  // keys with logit 0 and value 0 that are not stored
  const int64_t* map_tokens;  // increasing
  int64_t map_count;
  bool backward;  // which direction the keys and values are packed for
  View4 q, k, v;
};

// Bytes of the packed keys and values that the other stages read.
int64_t packed_bytes(const CrossAttention& p);
// Stage 1, both directions: count = batch / repeats * heads.
void pack_keys(const CrossAttention& p, void* packed, int64_t begin, int64_t end);

// Stage 2: query blocks; a block runs through all heads if `maps` is asked for, else through one.
int64_t forward_count(const CrossAttention& p);
// out [batch, queries, heads, head_dim] in dtype; maps [batch, queries, map_count] or null.
void forward(const CrossAttention& p, const void* packed, void* out, void* maps, int64_t begin, int64_t end);

struct CrossAttentionGradients {
  View4 out;  // data null: zero
  const void* maps;  // [batch, queries, map_count] or null: zero
  void *q;  // [batch, queries, heads, head_dim] or null: not wanted
  void *k, *v;  // [batch / repeats, heads, keys, head_dim], both or neither null
};
// Stage 2: count = batch / repeats * heads.
void backward(const CrossAttention& p, const CrossAttentionGradients& g, const void* packed, int64_t begin, int64_t end);

}  // namespace difffast
