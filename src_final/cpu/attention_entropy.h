// attention_entropy on the CPU; raw pointers only, so that it compiles and can be tested without PyTorch.
// The caller splits [0, count) of each stage over its threads; stages run one after the other.  Blocks do not depend on
// the number of threads and no two items share a sum: results are the same to the last bit for any split.
#pragma once

#include <cstdint>

namespace difffast {

struct AttentionEntropy {
  bool is_double;  // float64, else float32: type of every pointer to `void` here
  int64_t batch, pixels, columns;
  int64_t tokens;  // word pieces: columns 1 .. tokens
  const int64_t* anchors;  // increasing, in 1 .. tokens
  int64_t subjects;
  double tau, eps, weight;
  bool detach_min;
  const void* maps;  // [batch, pixels, columns]
  int64_t stride[3];  // of maps, in elements
};

// Of one subject: S, sum(g) - N gbar, gbar = sum(g p), and its part of the loss.
constexpr int64_t kEntropyStats = 4;

// Pixel blocks: count of forward stage 1 and of the backward pass.
int64_t entropy_blocks(const AttentionEntropy& p);
// Forward, stage 1: the subjects' columns of the softmax over the words -> shares [batch, subjects, pixels].
void entropy_columns(const AttentionEntropy& p, void* shares, int64_t begin, int64_t end);
// Forward, stage 2, count = batch * subjects: shares in place -> p; stats [batch, subjects, kEntropyStats]; argmin
// [batch, subjects], the pixel that carries the gradient of the minimum, or -1 for none.
void entropy_sums(const AttentionEntropy& p, void* shares, void* stats, int64_t* argmin, int64_t begin, int64_t end);
// Forward, stage 3, count = batch: loss [batch].
void entropy_loss(const AttentionEntropy& p, const void* stats, void* loss, int64_t begin, int64_t end);

struct AttentionEntropyGradient {
  const void* loss;  // [batch]
  const void *shares, *stats;
  const int64_t* argmin;
  void* maps;  // [batch, pixels, columns] contiguous
};
void entropy_backward(const AttentionEntropy& p, const AttentionEntropyGradient& g, int64_t begin, int64_t end);

}  // namespace difffast
