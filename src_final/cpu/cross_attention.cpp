#include "cross_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "instruction_set.h"

namespace difffast {
namespace {

#define DIFFFAST_KERNELS "cross_attention_kernel.h"
#include "every_set.h"

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

}  // namespace difffast
