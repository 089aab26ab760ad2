// Attention over any number of keys in up to two parts, those of a text and a query's own, on the CPU; raw pointers
// only, so that it compiles and can be tested without PyTorch.  Without a text it is self-attention.
// The caller splits [0, count) of each stage over its threads; stages run one after the other.
#pragma once

#include <cstdint>

#include "scalar.h"
#include "view4.h"

namespace difffast {

struct JointAttention {
  Scalar dtype;
  int64_t batch, heads, queries, head_dim;
  int64_t text_keys, keys;  // of each part; either may be 0
  int64_t repeats;  // queries' row b uses row b / repeats of the text's keys and values
  double scale;
  const int64_t* map_tokens;  // of the text, increasing
  int64_t map_count;
  View4 q, text_k, text_v, k, v;
};

// Bytes of the packed keys and values that the other stage reads: bfloat16 is widened once; the other types are read
// where they are, and need neither memory nor stage 1.
int64_t packed_bytes(const JointAttention& p);
// Stage 1: one item is one head of one row of either part.
int64_t pack_count(const JointAttention& p);
void pack_keys(const JointAttention& p, void* packed, int64_t begin, int64_t end);

// Stage 2: query blocks; a block runs through all heads if `maps` is asked for, else through one.
int64_t forward_count(const JointAttention& p);
// out [batch, queries, heads, head_dim] in dtype; maps [batch, queries, map_count] or null.
void forward(const JointAttention& p, void* packed, void* out, void* maps, int64_t begin, int64_t end);

}  // namespace difffast
