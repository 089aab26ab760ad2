#include <tuple>
#include <vector>

#include "cpu/attention_entropy.h"
#include "registration/tensors.h"

namespace difffast {
namespace {

// The sizes and operands of a call; `anchors` must outlive the result.
AttentionEntropy attention_entropy_on_cpu(const Tensor& maps, const std::vector<int64_t>& anchors,
                                                    int64_t n_tokens, double tau, double eps, double weight,
                                                    bool detach_min) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(maps.dim() == 3 && maps.size(1) >= 1, "maps must be [batch, pixels, columns] with pixels >= 1");
  const ScalarType dtype = maps.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "the kernel takes float32 and float64");
  STD_TORCH_CHECK(n_tokens >= 1 && n_tokens < maps.size(2), "n_tokens must lie in 1 .. ", maps.size(2) - 1, ", got ",
                  n_tokens);
  STD_TORCH_CHECK(!anchors.empty(), "at least one anchor is needed");
  int64_t previous = 0;
  for (int64_t anchor : anchors) {
    STD_TORCH_CHECK(anchor > previous && anchor <= n_tokens, "anchors must increase within 1 .. ", n_tokens, ", got ",
                    anchor, " after ", previous);
    previous = anchor;
  }
  return {dtype == ScalarType::Double,
          maps.size(0),
          maps.size(1),
          maps.size(2),
          n_tokens,
          anchors.data(),
          static_cast<int64_t>(anchors.size()),
          tau,
          eps,
          weight,
          detach_min,
          maps.const_data_ptr(),
          {maps.stride(0), maps.stride(1), maps.stride(2)}};
}

// Blocks of a thread, at least: with fewer it would cost more than it saves.
int64_t entropy_grain(const AttentionEntropy& p) { return 1 + 1024 / p.tokens; }

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_entropy(const Tensor& maps, std::vector<int64_t> anchors,
                                                             int64_t n_tokens, double tau, double eps, double weight,
                                                             bool detach_min) {
  const AttentionEntropy p = attention_entropy_on_cpu(maps, anchors, n_tokens, tau, eps, weight, detach_min);
  Tensor loss = empty({p.batch}, maps.scalar_type(), maps);
  Tensor shares = empty({p.batch, p.subjects, p.pixels}, maps.scalar_type(), maps);
  Tensor stats = empty({p.batch, p.subjects, kEntropyStats}, maps.scalar_type(), maps);
  Tensor argmin = empty({p.batch, p.subjects}, torch::headeronly::ScalarType::Long, maps);
  void *shares_data = shares.mutable_data_ptr(), *stats_data = stats.mutable_data_ptr();
  int64_t* argmin_data = static_cast<int64_t*>(argmin.mutable_data_ptr());
  torch::stable::parallel_for(0, entropy_blocks(p), entropy_grain(p), [&](int64_t begin, int64_t end) {
    entropy_columns(p, shares_data, begin, end);
  });
  torch::stable::parallel_for(0, p.batch * p.subjects, 1 + 4096 / p.pixels, [&](int64_t begin, int64_t end) {
    entropy_sums(p, shares_data, stats_data, argmin_data, begin, end);
  });
  entropy_loss(p, stats_data, loss.mutable_data_ptr(), 0, p.batch);
  return {loss, shares, stats, argmin};
}

Tensor attention_entropy_backward(const Tensor& grad_loss, const Tensor& maps, const Tensor& shares,
                                  const Tensor& stats, const Tensor& argmin, std::vector<int64_t> anchors,
                                  int64_t n_tokens, double tau, double eps, double weight) {
  const AttentionEntropy p = attention_entropy_on_cpu(maps, anchors, n_tokens, tau, eps, weight, false);
  const auto saved = [&](const Tensor& x, const std::vector<int64_t>& sizes, torch::headeronly::ScalarType dtype) {
    STD_TORCH_CHECK(x.sizes().vec() == sizes && x.scalar_type() == dtype,
                    "the forward pass has other outputs for these maps");
    return torch::stable::contiguous(x);
  };
  const auto dtype = maps.scalar_type();
  const Tensor grad = saved(grad_loss, {p.batch}, dtype);
  const Tensor p_of = saved(shares, {p.batch, p.subjects, p.pixels}, dtype);
  const Tensor sums = saved(stats, {p.batch, p.subjects, kEntropyStats}, dtype);
  const Tensor lowest = saved(argmin, {p.batch, p.subjects}, torch::headeronly::ScalarType::Long);
  Tensor out = empty({p.batch, p.pixels, p.columns}, maps.scalar_type(), maps);
  const AttentionEntropyGradient g{grad.const_data_ptr(), p_of.const_data_ptr(), sums.const_data_ptr(),
                                             static_cast<const int64_t*>(lowest.const_data_ptr()),
                                             out.mutable_data_ptr()};
  torch::stable::parallel_for(0, entropy_blocks(p), entropy_grain(p),
                              [&](int64_t begin, int64_t end) { entropy_backward(p, g, begin, end); });
  return out;
}

}  // namespace
}  // namespace difffast

STABLE_TORCH_LIBRARY_IMPL(difffast, CPU, m) {
  m.impl("attention_entropy.cpp", TORCH_BOX(&difffast::attention_entropy));
  m.impl("attention_entropy_backward.cpp", TORCH_BOX(&difffast::attention_entropy_backward));
}
