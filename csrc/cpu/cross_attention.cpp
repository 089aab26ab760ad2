#include "cross_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

namespace difffast {
namespace {

struct BFloat16 {
  uint16_t bits;
};

#define DIFFFAST_TARGET
#define DIFFFAST_VECTOR_BYTES 16
#define DIFFFAST_REGISTERS 16
namespace baseline {
#include "simd.h"
#include "cross_attention_kernel.h"
}  // namespace baseline

#if defined(__x86_64__)
#undef DIFFFAST_TARGET
#undef DIFFFAST_VECTOR_BYTES
#define DIFFFAST_TARGET __attribute__((target("avx2,fma")))
#define DIFFFAST_VECTOR_BYTES 32
namespace avx2 {
#include "simd.h"
#include "cross_attention_kernel.h"
}  // namespace avx2

#undef DIFFFAST_TARGET
#undef DIFFFAST_VECTOR_BYTES
#undef DIFFFAST_REGISTERS
#define DIFFFAST_TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")))
#define DIFFFAST_VECTOR_BYTES 64
#define DIFFFAST_REGISTERS 32
namespace avx512 {
#include "simd.h"
#include "cross_attention_kernel.h"
}  // namespace avx512
#endif

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// DIFFFAST_INSTRUCTION_SET=baseline or avx2 keeps to a smaller set, so that tests reach all of them on one machine.
InstructionSet detect() {
#if defined(__x86_64__)
  const char* asked = std::getenv("DIFFFAST_INSTRUCTION_SET");
  const std::string most = asked ? asked : "avx512";
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && most == "avx512") return InstructionSet::kAvx512;
  if (has_avx2 && most != "baseline") return InstructionSet::kAvx2;
#endif
  return InstructionSet::kBaseline;
}

InstructionSet best() {
  static const InstructionSet set = detect();
  return set;
}

#if defined(__x86_64__)
#define DIFFFAST_BY_SET(call)                           \
  switch (best()) {                                     \
    case InstructionSet::kAvx512: return avx512::call;  \
    case InstructionSet::kAvx2: return avx2::call;      \
    default: return baseline::call;                     \
  }
#else
#define DIFFFAST_BY_SET(call) return baseline::call;
#endif

template <class S>
void pack(const CrossAttention& p, void* packed, int64_t begin, int64_t end) {
  DIFFFAST_BY_SET(pack_keys<S>(p, packed, begin, end))
}

template <class S>
void run_forward(const CrossAttention& p, const void* packed, void* out, void* maps, int64_t begin, int64_t end) {
  DIFFFAST_BY_SET(forward<S>(p, packed, out, maps, begin, end))
}

template <class S>
void run_backward(const CrossAttention& p, const CrossAttentionGradients& g, const void* packed, int64_t begin, int64_t end) {
  DIFFFAST_BY_SET(backward<S>(p, g, packed, begin, end))
}

template <class T>
int64_t elements(const CrossAttention& p) {
  DIFFFAST_BY_SET(pack_elements<T>(p))
}

}  // namespace

int64_t packed_bytes(const CrossAttention& p) {
  const int64_t items = p.batch / p.repeats * p.heads;
  return items * compute_size(p.dtype) * (p.dtype == Scalar::kFloat64 ? elements<double>(p) : elements<float>(p));
}

void pack_keys(const CrossAttention& p, void* packed, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Scalar::kFloat32: return pack<float>(p, packed, begin, end);
    case Scalar::kFloat64: return pack<double>(p, packed, begin, end);
    case Scalar::kBFloat16: return pack<BFloat16>(p, packed, begin, end);
  }
}

int64_t forward_count(const CrossAttention& p) {
  return p.batch * ((p.queries + baseline::kBlock - 1) / baseline::kBlock) * (p.map_count > 0 ? 1 : p.heads);
}

void forward(const CrossAttention& p, const void* packed, void* out, void* maps, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Scalar::kFloat32: return run_forward<float>(p, packed, out, maps, begin, end);
    case Scalar::kFloat64: return run_forward<double>(p, packed, out, maps, begin, end);
    case Scalar::kBFloat16: return run_forward<BFloat16>(p, packed, out, maps, begin, end);
  }
}

void backward(const CrossAttention& p, const CrossAttentionGradients& g, const void* packed, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Scalar::kFloat32: return run_backward<float>(p, g, packed, begin, end);
    case Scalar::kFloat64: return run_backward<double>(p, g, packed, begin, end);
    case Scalar::kBFloat16: return run_backward<BFloat16>(p, g, packed, begin, end);
  }
}

const char* instruction_set() {
  switch (best()) {
    case InstructionSet::kAvx512: return "avx512";
    case InstructionSet::kAvx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace difffast
