// Cross attention on the host: what its kernel cannot do, its workspace, its launch.

#include "cross_attention.h"
#include "cross_attention_kernel.h"
#include "device.h"

namespace difffast::cuda {
namespace {

template <typename Element, int GROUPS, bool MAPS>
cudaError_t launch_kernel(Problem& problem, int device, cudaStream_t stream) {
  const auto kernel = forward_kernel<Element, GROUPS, MAPS>;
  const cudaError_t error = allow_all_shared_memory(kernel, device);
  if (error != cudaSuccess) return error;
  const CrossAttentionArgs& args = problem.args;
  const Layout& layout = problem.layout;
  const unsigned blocks = static_cast<unsigned>(layout.splits) * args.batch * layout.head_groups;
  void* arguments[] = {&problem};
  return cudaLaunchKernel(kernel, dim3(blocks), dim3(layout.warps * kWarp), arguments, layout.shared_bytes, stream);
}

template <typename Element, bool MAPS>
cudaError_t launch_for_keys(Problem& problem, int device, cudaStream_t stream) {
  switch (problem.layout.groups) {
    case 1: return launch_kernel<Element, 1, MAPS>(problem, device, stream);
    case 2: return launch_kernel<Element, 2, MAPS>(problem, device, stream);
    case 4: return launch_kernel<Element, 4, MAPS>(problem, device, stream);
    case 5: return launch_kernel<Element, 5, MAPS>(problem, device, stream);
    default: return launch_kernel<Element, 8, MAPS>(problem, device, stream);
  }
}

template <typename Element>
cudaError_t launch_for_maps(Problem& problem, int device, cudaStream_t stream) {
  return wants_maps(problem.args) ? launch_for_keys<Element, true>(problem, device, stream)
                                  : launch_for_keys<Element, false>(problem, device, stream);
}

cudaError_t launch_sum(const Problem& problem, cudaStream_t stream) {
  const CrossAttentionArgs& args = problem.args;
  const int64_t count = static_cast<int64_t>(args.batch) * args.queries * args.map_count;
  Sums sums = {problem.map_sums, args.maps, count, problem.layout.head_groups};
  void* arguments[] = {&sums};
  return cudaLaunchKernel(sum_kernel, dim3(divide_up(count, kSumThreads)), dim3(kSumThreads), arguments, 0, stream);
}

// Floats of the sums of head groups, 0 where a block has all heads.
int64_t workspace_floats(const CrossAttentionArgs& args, const Layout& layout) {
  if (!wants_maps(args) || layout.head_groups == 1) return 0;
  return static_cast<int64_t>(layout.head_groups) * args.batch * args.queries * args.map_count;
}

cudaError_t plan_on_current_device(const CrossAttentionArgs& args, int& device, Layout& layout) {
  int multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = device_attribute<cudaDevAttrMultiProcessorCount>(device, multiprocessors);
  if (error == cudaSuccess) layout = plan(args, multiprocessors);
  return error;
}

bool is_empty(const CrossAttentionArgs& args) { return args.batch == 0 || args.heads == 0 || args.queries == 0; }

int count_bits(uint64_t word) {
  int count = 0;
  for (; word != 0; word &= word - 1) ++count;
  return count;
}

// Reads and writes go 16 bytes at a time.
const char* alignment_obstacle(
    const char* name, const void* data, const CrossAttentionStrides& strides, const int (&sizes)[3]) {
  if (data == nullptr) return message("%s must be a device pointer, got null", name);
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(data) % kPieceBytes);
  if (past != 0) return message("%s must be aligned to %d bytes, got an address %d past that", name, kPieceBytes, past);
  const char* const kinds[] = {"batch", "head", "row"};
  const int64_t values[] = {strides.batch, strides.head, strides.row};
  for (int i = 0; i < 3; ++i) {
    // Never multiplied by anything but 0 otherwise.
    if (sizes[i] > 1 && values[i] % kPieceElements != 0) {
      return message(
          "the %s stride of %s must be a multiple of %d elements, got %lld", kinds[i], name, kPieceElements,
          static_cast<long long>(values[i]));
    }
  }
  return nullptr;
}

}  // namespace

const char* cross_attention_obstacle(const CrossAttentionArgs& args) {
  if (args.dtype != ElementType::kFloat16 && args.dtype != ElementType::kBFloat16) {
    return message("dtype must be float16 (0) or bfloat16 (1), got %d", static_cast<int>(args.dtype));
  }
  if (args.batch < 0) return message("batch must be at least 0, got %d", args.batch);
  if (args.heads < 0) return message("heads must be at least 0, got %d", args.heads);
  if (args.queries < 0) return message("queries must be at least 0, got %d", args.queries);
  if (args.keys < 1 || args.keys > kMaxKeys) return message("keys must be 1 to %d, got %d", kMaxKeys, args.keys);
  if (args.head_dim < kPieceElements || args.head_dim > kMaxHeadDim || args.head_dim % kPieceElements != 0) {
    return message(
        "head_dim must be a multiple of %d up to %d, got %d", kPieceElements, kMaxHeadDim, args.head_dim);
  }
  if (args.kv_repeats < 1 || args.batch % args.kv_repeats != 0) {
    return message("kv_repeats must divide batch, got %d and %d", args.kv_repeats, args.batch);
  }
  if (args.sink < 0) return message("sink must be at least 0, got %d", args.sink);
  if (!(args.scale > 0.0f && args.scale < kInfinity)) {
    return message("scale must be positive and finite, got %g", static_cast<double>(args.scale));
  }
  const int chosen = count_bits(args.map_mask[0]) + count_bits(args.map_mask[1]);
  if (args.map_count != chosen) {
    return message("map_count must be the number of bits in map_mask (%d), got %d", chosen, args.map_count);
  }
  for (int token = kMaxKeys - 1; token >= args.keys; --token) {
    if (args.map_mask[token / 64] >> token % 64 & 1) {
      return message("map_mask must choose keys below %d, got key %d", args.keys, token);
    }
  }
  // Blocks are numbered in 32 bits, and so are rows including those a last tile has past the end.
  const int64_t blocks = static_cast<int64_t>(args.queries / 16 + 1) * args.batch;
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (args.queries > kMost - 128 || (args.heads > 0 && blocks > kMost / args.heads)) {
    return message(
        "batch * heads * queries / 16 must be below 2**31, got %d * %d * %d / 16", args.batch, args.heads,
        args.queries);
  }
  if (is_empty(args)) return nullptr;

  if (args.map_count > 0 && args.maps == nullptr) {
    return message("maps must be a device pointer when map_count is %d, got null", args.map_count);
  }
  const int q_sizes[] = {args.batch, args.heads, args.queries};
  const int kv_sizes[] = {args.batch / args.kv_repeats, args.heads, args.keys};
  if (const char* text = alignment_obstacle("q", args.q, args.q_strides, q_sizes)) return text;
  if (const char* text = alignment_obstacle("k", args.k, args.k_strides, kv_sizes)) return text;
  if (const char* text = alignment_obstacle("v", args.v, args.v_strides, kv_sizes)) return text;
  return alignment_obstacle("out", args.out, args.out_strides, q_sizes);
}

const char* cross_attention_workspace(const CrossAttentionArgs& args, int64_t* floats) {
  *floats = 0;
  if (const char* text = cross_attention_obstacle(args)) return text;
  if (is_empty(args) || !wants_maps(args)) return nullptr;
  int device = 0;
  Layout layout = {};
  const cudaError_t error = plan_on_current_device(args, device, layout);
  if (error != cudaSuccess) return text_of(error);
  *floats = workspace_floats(args, layout);
  return nullptr;
}

const char* cross_attention_forward(const CrossAttentionArgs& args, float* workspace, void* stream) {
  if (const char* text = cross_attention_obstacle(args)) return text;
  if (is_empty(args)) return nullptr;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  Problem problem = {args, {}, args.maps};
  int device = 0;
  cudaError_t error = plan_on_current_device(args, device, problem.layout);
  if (error != cudaSuccess) return text_of(error);
  const bool in_parts = workspace_floats(args, problem.layout) > 0;
  if (in_parts) {
    if (workspace == nullptr) return message("workspace must be a device pointer, got null");
    problem.map_sums = workspace;
  }
  error = args.dtype == ElementType::kFloat16 ? launch_for_maps<Float16>(problem, device, on)
                                              : launch_for_maps<BFloat16>(problem, device, on);
  if (error == cudaSuccess && in_parts) error = launch_sum(problem, on);
  return error == cudaSuccess ? nullptr : text_of(error);
}

}  // namespace difffast::cuda
