// Attention over any number of keys in up to two parts, those of a text and a query's own, on the CPU; raw pointers
// only, so that it compiles and can be tested without PyTorch.  Without a text it is self-attention.
// The caller splits [0, count) over its threads.
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

// Whether operands of a dtype are multiplied in AMX's tiles: then this is the fastest way to attend to few keys as well.
bool multiplies_in_tiles(Scalar dtype);

// One item is a block of query rows; it runs through all heads if `maps` is asked for, else through one.  Items of one
// head follow each other: a thread that has several copies the head's keys and values once.
int64_t forward_count(const JointAttention& p);
// out [batch, queries, heads, head_dim] in dtype; maps [batch, queries, map_count] or null.
void forward(const JointAttention& p, void* out, void* maps, int64_t begin, int64_t end);

}  // namespace difffast
