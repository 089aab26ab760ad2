#include "joint_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "instruction_set.h"

namespace difffast {
namespace {

#define DIFFFAST_KERNELS "joint_attention_kernel.h"
#include "every_set.h"

template <class S>
void run(const JointAttention& p, void* packed, void* out, void* maps, int64_t begin, int64_t end) {
  DIFFFAST_BY_SET(forward<S>(p, packed, out, maps, begin, end))
}

}  // namespace

int64_t packed_bytes(const JointAttention& p) {
  const int64_t keys = p.batch / p.repeats * p.text_keys + p.batch * p.keys;
  return p.dtype == Scalar::kBFloat16 ? 2 * keys * p.heads * p.head_dim * compute_size(p.dtype) : 0;
}

int64_t pack_count(const JointAttention& p) {
  if (p.dtype != Scalar::kBFloat16) return 0;
  return p.heads * ((p.text_keys > 0 ? p.batch / p.repeats : 0) + (p.keys > 0 ? p.batch : 0));
}

void pack_keys(const JointAttention& p, void* packed, int64_t begin, int64_t end) {
  DIFFFAST_BY_SET(pack_parts<BFloat16>(p, packed, begin, end))
}

int64_t forward_count(const JointAttention& p) {
  return p.batch * ((p.queries + baseline::kRows - 1) / baseline::kRows) * (p.map_count > 0 ? 1 : p.heads);
}

void forward(const JointAttention& p, void* packed, void* out, void* maps, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Scalar::kFloat32: return run<float>(p, packed, out, maps, begin, end);
    case Scalar::kFloat64: return run<double>(p, packed, out, maps, begin, end);
    case Scalar::kBFloat16: return run<BFloat16>(p, packed, out, maps, begin, end);
  }
}

}  // namespace difffast
