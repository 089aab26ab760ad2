#include "joint_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "instruction_set.h"

namespace difffast {
namespace {

#define DIFFFAST_KERNELS "joint_attention_kernel.h"
#define DIFFFAST_WITH_BF16
#include "every_set.h"

template <class S>
int64_t blocks_of(const JointAttention& p) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    DIFFFAST_BY_BF16_SET(count_blocks<S>(p))
  } else {
    DIFFFAST_BY_SET(count_blocks<S>(p))
  }
}

template <class S>
void run(const JointAttention& p, void* out, void* maps, int64_t begin, int64_t end) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    DIFFFAST_BY_BF16_SET(forward<S>(p, out, maps, begin, end))
  } else {
    DIFFFAST_BY_SET(forward<S>(p, out, maps, begin, end))
  }
}

int64_t blocks_of(const JointAttention& p) {
  switch (p.dtype) {
    case Scalar::kFloat32: return blocks_of<float>(p);
    case Scalar::kFloat64: return blocks_of<double>(p);
    default: return blocks_of<BFloat16>(p);
  }
}

}  // namespace

bool multiplies_in_tiles(Scalar dtype) {
  const InstructionSet set = best_instruction_set();
  return dtype == Scalar::kBFloat16 && (set == InstructionSet::kAmx || set == InstructionSet::kEmulatedAmx);
}

int64_t forward_count(const JointAttention& p) { return p.batch * blocks_of(p) * (p.map_count > 0 ? 1 : p.heads); }

void forward(const JointAttention& p, void* out, void* maps, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Scalar::kFloat32: return run<float>(p, out, maps, begin, end);
    case Scalar::kFloat64: return run<double>(p, out, maps, begin, end);
    case Scalar::kBFloat16: return run<BFloat16>(p, out, maps, begin, end);
  }
}

}  // namespace difffast
