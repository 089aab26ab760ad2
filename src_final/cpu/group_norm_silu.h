// group_norm_silu and skip_norm_silu on the CPU; raw pointers only, so that it compiles and can be tested without
// PyTorch.
// The caller splits [0, count) of each stage over its threads; stages run one after the other.  Items do not depend on
// the number of threads and no two share a sum: results are the same to the last bit for any split.
#pragma once

#include <cstdint>

#include "scalar.h"

namespace difffast {

// The norm's channels are those of x, then those of the skip, of which `repeats` neighbouring rows of x share one row.
// Channels up to `kept` (own rounded up to whole groups) go to out, the others, which do not depend on x, to shared.
// Without a skip: own = kept = channels.  All tensors dense: [batch, channels, pixels] or, if channels_last,
// [batch, pixels, channels].
struct GroupNormSilu {
  Scalar dtype;
  bool channels_last, silu;
  int64_t batch, channels, pixels, groups;
  double eps;
  const void *weight, *bias;  // [channels]
  const void* x;  // own channels
  int64_t own, kept;
  const void* skip;  // channels - own of them, batch / repeats rows
  int64_t repeats;
  void* out;  // kept channels
  void* shared;  // channels - kept of them, batch / repeats rows
  // Without a skip only; null: none.
  const void* addend;  // batch / addend_repeats rows: as x, or [rows, channels]
  int64_t addend_repeats;
  bool addend_by_channel;
  const void *scale, *shift;  // [batch, channels]
};

// Not channels_last: one stage, an item is a group of a row.
int64_t norm_groups(const GroupNormSilu& p);
void norm_planes(const GroupNormSilu& p, int64_t begin, int64_t end);

// channels_last: three stages; scratch lives through all of them.
int64_t norm_scratch_bytes(const GroupNormSilu& p);
// Stages 1 and 3: an item is a block of pixels of a row of x, or after all of these of the skip.
int64_t norm_blocks(const GroupNormSilu& p);
void norm_moments(const GroupNormSilu& p, void* scratch, int64_t begin, int64_t end);
// Stage 2: count = batch * groups.
void norm_coefficients(const GroupNormSilu& p, void* scratch, int64_t begin, int64_t end);
void norm_pixels(const GroupNormSilu& p, const void* scratch, int64_t begin, int64_t end);

}  // namespace difffast
