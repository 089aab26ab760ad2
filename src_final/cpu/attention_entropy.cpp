#include "attention_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "instruction_set.h"
#include "scalar.h"

namespace difffast {
namespace {

#define DIFFFAST_KERNELS "attention_entropy_kernel.h"
#include "every_set.h"

template <class T>
void run_columns(const AttentionEntropy& p, void* shares, int64_t begin, int64_t end) {
  DIFFFAST_BY_SET(columns(p, static_cast<T*>(shares), begin, end))
}

template <class T>
void run_sums(const AttentionEntropy& p, void* shares, void* stats, int64_t* argmin, int64_t begin, int64_t end) {
  DIFFFAST_BY_SET(sums(p, static_cast<T*>(shares), static_cast<T*>(stats), argmin, begin, end))
}

template <class T>
void run_backward(const AttentionEntropy& p, const AttentionEntropyGradient& g, int64_t begin, int64_t end) {
  DIFFFAST_BY_SET(backward<T>(p, g, begin, end))
}

template <class T>
void add_subjects(const AttentionEntropy& p, const T* stats, T* loss, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    loss[b] = 0;
    for (int64_t k = 0; k < p.subjects; ++k) loss[b] += stats[(b * p.subjects + k) * kEntropyStats + 3];
  }
}

}  // namespace

int64_t entropy_blocks(const AttentionEntropy& p) {
  return p.batch * ((p.pixels + baseline::kBlock - 1) / baseline::kBlock);
}

void entropy_columns(const AttentionEntropy& p, void* shares, int64_t begin, int64_t end) {
  p.is_double ? run_columns<double>(p, shares, begin, end) : run_columns<float>(p, shares, begin, end);
}

void entropy_sums(const AttentionEntropy& p, void* shares, void* stats, int64_t* argmin, int64_t begin, int64_t end) {
  p.is_double ? run_sums<double>(p, shares, stats, argmin, begin, end)
              : run_sums<float>(p, shares, stats, argmin, begin, end);
}

void entropy_loss(const AttentionEntropy& p, const void* stats, void* loss, int64_t begin, int64_t end) {
  p.is_double ? add_subjects(p, static_cast<const double*>(stats), static_cast<double*>(loss), begin, end)
              : add_subjects(p, static_cast<const float*>(stats), static_cast<float*>(loss), begin, end);
}

void entropy_backward(const AttentionEntropy& p, const AttentionEntropyGradient& g, int64_t begin, int64_t end) {
  p.is_double ? run_backward<double>(p, g, begin, end) : run_backward<float>(p, g, begin, end);
}

}  // namespace difffast
