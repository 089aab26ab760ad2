#include "group_norm_silu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "instruction_set.h"

namespace difffast {
namespace {

#define DIFFFAST_KERNELS "group_norm_silu_kernel.h"
#include "every_set.h"

template <class S>
void run_planes(const GroupNormSilu& p, int64_t begin, int64_t end) {
  DIFFFAST_BY_SET(planes<S>(p, begin, end))
}

template <class S>
void run_moments(const GroupNormSilu& p, void* scratch, int64_t begin, int64_t end) {
  DIFFFAST_BY_SET(moments<S>(p, scratch, begin, end))
}

template <class S>
void run_coefficients(const GroupNormSilu& p, void* scratch, int64_t begin, int64_t end) {
  DIFFFAST_BY_SET(coefficients<S>(p, scratch, begin, end))
}

template <class S>
void run_pixels(const GroupNormSilu& p, const void* scratch, int64_t begin, int64_t end) {
  DIFFFAST_BY_SET(pixels<S>(p, scratch, begin, end))
}

}  // namespace

int64_t norm_groups(const GroupNormSilu& p) {
  const int64_t kept = p.kept / (p.channels / p.groups);
  return p.batch * kept + p.batch / p.repeats * (p.groups - kept);
}

void norm_planes(const GroupNormSilu& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Scalar::kFloat32: return run_planes<float>(p, begin, end);
    case Scalar::kFloat64: return run_planes<double>(p, begin, end);
    case Scalar::kBFloat16: return run_planes<BFloat16>(p, begin, end);
  }
}

int64_t norm_scratch_bytes(const GroupNormSilu& p) {
  if (p.dtype == Scalar::kFloat64) return baseline::Scratch<double>(p, nullptr).count * sizeof(double);
  return baseline::Scratch<float>(p, nullptr).count * sizeof(float);
}

int64_t norm_blocks(const GroupNormSilu& p) {
  return (p.batch + (p.skip ? p.batch / p.repeats : 0)) * baseline::row_blocks(p);
}

void norm_moments(const GroupNormSilu& p, void* scratch, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Scalar::kFloat32: return run_moments<float>(p, scratch, begin, end);
    case Scalar::kFloat64: return run_moments<double>(p, scratch, begin, end);
    case Scalar::kBFloat16: return run_moments<BFloat16>(p, scratch, begin, end);
  }
}

void norm_coefficients(const GroupNormSilu& p, void* scratch, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Scalar::kFloat32: return run_coefficients<float>(p, scratch, begin, end);
    case Scalar::kFloat64: return run_coefficients<double>(p, scratch, begin, end);
    case Scalar::kBFloat16: return run_coefficients<BFloat16>(p, scratch, begin, end);
  }
}

void norm_pixels(const GroupNormSilu& p, const void* scratch, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Scalar::kFloat32: return run_pixels<float>(p, scratch, begin, end);
    case Scalar::kFloat64: return run_pixels<double>(p, scratch, begin, end);
    case Scalar::kBFloat16: return run_pixels<BFloat16>(p, scratch, begin, end);
  }
}

}  // namespace difffast
