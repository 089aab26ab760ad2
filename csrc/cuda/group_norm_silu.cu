// Launches of group_norm_silu and skip_norm_silu: how the work is spread over blocks, and what is refused.

#include "device.h"
#include "group_norm_silu.h"
#include "group_norm_silu_kernel.h"

#include <limits>
#include <tuple>

namespace difffast::cuda {
namespace {

// Blocks that a cluster may have on every device with clusters.
constexpr int kMaxCluster = 8;
// Of pixels in shared memory: what is worth a block of its own, what a block that no other one helps should not exceed
// unless there are slabs for most processors, and what leaves room for several blocks on a processor.
constexpr int kWorthwhileTile = 4 * 1024;
constexpr int kSmallTile = 16 * 1024;
constexpr int kSplitTile = 32 * 1024;
// Of neighbouring channels: whole sectors are 32 bytes, whole cache lines 128.
constexpr int kLineBytes = 128;

struct Device {
  int id;
  int multiprocessors;
  int shared_bytes;  // that a block may have
  bool clusters;
};

cudaError_t current_device(Device& device) {
  int clusters = 0;
  cudaError_t error = cudaGetDevice(&device.id);
  const int id = device.id;
  if (error == cudaSuccess) error = device_attribute<cudaDevAttrMultiProcessorCount>(id, device.multiprocessors);
  if (error == cudaSuccess) {
    error = device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(id, device.shared_bytes);
  }
  if (error == cudaSuccess) error = device_attribute<cudaDevAttrClusterLaunch>(id, clusters);
  static Remembered<int> versions;
  int version = 0;
  if (error == cudaSuccess) {
    error = versions.get(id, version, [](int& answer) {
      cudaFuncAttributes kernel = {};
      const cudaError_t error = cudaFuncGetAttributes(&kernel, norm_kernel<Float32, false>);
      answer = kernel.ptxVersion;
      return error;
    });
  }
  // The driver may have compiled the kernels from the instructions of an older device, which has no clusters.
  device.clusters = clusters != 0 && version >= 90;
  return error;
}

int element_bytes(const GroupNormSilu& args) { return args.dtype == ElementType::kFloat32 ? 4 : 2; }

int round_up(int64_t a, int b) { return divide_up(a, b) * b; }

// More than any block may have: what is larger need not be told apart, and must not wrap around.
constexpr int64_t kTooLarge = 1 << 28;

// Sets how the pixels of slabs are spread over blocks, and with that the sizes in shared memory.
void set_span(Layout& layout, const GroupNormSilu& args, int span) {
  const int size = static_cast<int>(args.channels / args.groups), vector = kVectorBytes / element_bytes(args);
  const int channels = layout.slab_groups * size;
  layout.span = args.channels_last ? span : round_up(span, vector);
  const int width = divide_up(args.channels_last ? channels : layout.span, vector);
  const int64_t whole = int64_t{args.channels_last ? layout.span : size} * width;
  const int vectors = static_cast<int>(whole < kTooLarge / kVectorBytes ? whole : kTooLarge / kVectorBytes);
  layout.tile_bytes = vectors * kVectorBytes;
  layout.threads = round_up(divide_up(vectors, 4), kWarp);
  if (layout.threads < 2 * kWarp) layout.threads = 2 * kWarp;
  if (layout.threads > kMaxThreads) layout.threads = kMaxThreads;
  // A thread has one vector of sums, or where a row has more vectors than there are threads, several.
  layout.sums_bytes = args.channels_last ? (layout.threads > width ? layout.threads : width) * vector * 4 : 0;
  const int tiles = args.addend != nullptr && !args.addend_by_channel ? 2 : 1;
  layout.shared_bytes = tiles * layout.tile_bytes + layout.sums_bytes +
                        4 * small_floats(channels, layout.slab_groups, layout.threads / kWarp);
}

int64_t slabs(const GroupNormSilu& args, const Layout& layout) {
  return args.batch * layout.own_slabs + args.batch / args.repeats * layout.shared_slabs;
}

int64_t blocks(const GroupNormSilu& args, const Layout& layout) { return slabs(args, layout) * layout.parts; }

// ---- Launches of one kernel ----

// A launch, of clusters where the blocks of a slab are one.
struct Launch {
  cudaLaunchAttribute cluster = {};
  cudaLaunchConfig_t config = {};

  Launch(const GroupNormSilu& args, const Layout& layout, bool in_clusters, cudaStream_t stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = layout.parts;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(blocks(args, layout)));
    config.blockDim = dim3(layout.threads);
    config.dynamicSmemBytes = layout.shared_bytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = in_clusters ? 1 : 0;
  }
  Launch(const Launch&) = delete;  // the configuration points into it
};

using Kernel = void (*)(Problem);

template <typename Element>
Kernel kernel_for_layout(bool channels_last) {
  return channels_last ? norm_kernel<Element, true> : norm_kernel<Element, false>;
}

Kernel kernel_of(const GroupNormSilu& args) {
  switch (args.dtype) {
    case ElementType::kFloat16: return kernel_for_layout<Float16>(args.channels_last);
    case ElementType::kBFloat16: return kernel_for_layout<BFloat16>(args.channels_last);
    default: return kernel_for_layout<Float32>(args.channels_last);
  }
}

cudaError_t launch(const Problem& problem, int device, cudaStream_t stream) {
  const Kernel kernel = kernel_of(problem.args);
  const cudaError_t error = allow_all_shared_memory(kernel, device);
  if (error != cudaSuccess) return error;
  const bool in_clusters = problem.stage == Stage::kWhole && problem.layout.parts > 1;
  const Launch launch(problem.args, problem.layout, in_clusters, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, problem);
}

// How many clusters of this layout the device runs together: how its processors are grouped decides, and what else
// keeps them from us (a partition, a limit of MPS).
cudaError_t count_clusters(const GroupNormSilu& args, const Layout& layout, int device, int& clusters) {
  const Kernel kernel = kernel_of(args);
  // All that the answer depends on.
  using Configuration = std::tuple<Kernel, int, int, int, int>;
  static Remembered<Configuration> answers;
  const Configuration configuration(kernel, device, layout.parts, layout.threads, layout.shared_bytes);
  return answers.get(configuration, clusters, [&](int& answer) {
    const cudaError_t error = allow_all_shared_memory(kernel, device);
    if (error != cudaSuccess) return error;
    const Launch launch(args, layout, true, nullptr);
    if (cudaOccupancyMaxActiveClusters(&answer, kernel, &launch.config) != cudaSuccess) {
      // It cannot say, for example of a cluster that is too large: then there is none. Taken from the runtime, too.
      cudaGetLastError();
      answer = 0;
    }
    return cudaSuccess;
  });
}

// ---- Plan ----

// Whether clusters of this layout pay. Two launches read twice and write once, so that clusters which leave more than a
// third of their places empty, in a last wave, take longer.
cudaError_t clusters_pay(const GroupNormSilu& args, const Layout& layout, int device, bool& pay) {
  int clusters = 0;
  const cudaError_t error = count_clusters(args, layout, device, clusters);
  const int64_t all = slabs(args, layout);
  pay = clusters > 0 && (all <= clusters || 3 * all >= int64_t{2} * divide_up(all, clusters) * clusters);
  return error;
}

// Groups of a slab, and with that the slabs.
void set_slabs(Layout& layout, const GroupNormSilu& args, const Device& device) {
  const int size = static_cast<int>(args.channels / args.groups), kept_groups = static_cast<int>(args.kept) / size;
  const int rest = static_cast<int>(args.groups) - kept_groups;
  const auto count = [&](int groups) {
    return args.batch * divide_up(kept_groups, groups) + args.batch / args.repeats * divide_up(rest, groups);
  };
  layout.slab_groups = 1;
  if (args.channels_last) {
    const int row = size * element_bytes(args);
    const auto wider = [&] {
      const int groups = 2 * layout.slab_groups;
      return groups <= (kept_groups > rest ? kept_groups : rest) && groups * size <= kMaxGroupChannels;
    };
    while (layout.slab_groups * row % kVectorBytes != 0 && wider()) layout.slab_groups *= 2;
    while (layout.slab_groups * row < kLineBytes && wider() &&
           count(2 * layout.slab_groups) * kMaxCluster >= device.multiprocessors) {
      layout.slab_groups *= 2;
    }
  }
  layout.own_slabs = divide_up(kept_groups, layout.slab_groups);
  layout.shared_slabs = divide_up(rest, layout.slab_groups);
}

cudaError_t plan(const GroupNormSilu& args, const Device& device, Layout& layout) {
  layout = {};
  set_slabs(layout, args, device);
  const int64_t all = slabs(args, layout);

  // One pass: more blocks for a slab until two fit into a processor and all processors have one.
  const int most = device.clusters ? kMaxCluster : 1;
  for (layout.parts = 1; layout.parts <= most; layout.parts *= 2) {
    const int span = divide_up(args.pixels, layout.parts);
    set_span(layout, args, span);
    const bool last = 2 * layout.parts > most;
    const bool spread = all * layout.parts >= device.multiprocessors || layout.tile_bytes < 2 * kWorthwhileTile;
    layout.one_pass = layout.shared_bytes <= (last ? device.shared_bytes : device.shared_bytes / 2) && (spread || last);
    if (most == 1 && 2 * all < device.multiprocessors && layout.tile_bytes > kSmallTile) layout.one_pass = false;
    if (layout.one_pass && layout.parts > 1) {
      const cudaError_t error = clusters_pay(args, layout, device.id, layout.one_pass);
      if (error != cudaSuccess) return error;
    }
    if (layout.one_pass) return cudaSuccess;
  }

  // Two passes: several blocks in a processor, and blocks for all of them.
  int span = static_cast<int>(args.pixels);
  const int least = args.channels_last ? 1 : kVectorBytes / element_bytes(args);
  for (;; span = divide_up(span, 2)) {
    set_span(layout, args, span);
    layout.parts = divide_up(args.pixels, layout.span);
    if (span <= least || layout.tile_bytes < 2 * kWorthwhileTile) break;
    const bool fits = layout.tile_bytes <= kSplitTile && layout.shared_bytes <= device.shared_bytes;
    if (fits && all * layout.parts >= 2 * device.multiprocessors) break;
  }
  return cudaSuccess;
}

// The current device, and the layout for it.
cudaError_t plan_here(const GroupNormSilu& args, Device& device, Layout& layout) {
  const cudaError_t error = current_device(device);
  return error == cudaSuccess ? plan(args, device, layout) : error;
}

}  // namespace

const char* group_norm_silu_obstacle(const GroupNormSilu& args) {
  const auto number = [](int64_t value) { return static_cast<long long>(value); };
  if (args.dtype != ElementType::kFloat16 && args.dtype != ElementType::kBFloat16 &&
      args.dtype != ElementType::kFloat32) {
    return message("dtype must be float16 (0), bfloat16 (1) or float32 (2), got %d", static_cast<int>(args.dtype));
  }
  if (args.batch < 0) return message("batch must be at least 0, got %lld", number(args.batch));
  if (args.pixels < 1) return message("pixels must be at least 1, got %lld", number(args.pixels));
  if (args.groups < 1 || args.channels < 1 || args.channels % args.groups != 0) {
    return message("groups must divide channels, got %lld and %lld", number(args.groups), number(args.channels));
  }
  const int64_t size = args.channels / args.groups;
  if (size > kMaxGroupChannels) {
    return message("a group must have at most %d channels, got %lld", kMaxGroupChannels, number(size));
  }
  if (args.own < 1 || args.own > args.channels || args.kept != (args.own + size - 1) / size * size) {
    return message(
        "kept must be own rounded up to groups of %lld, got %lld and %lld", number(size), number(args.kept),
        number(args.own));
  }
  if (args.repeats < 1 || args.batch % args.repeats != 0) {
    return message("repeats must divide batch, got %lld and %lld", number(args.repeats), number(args.batch));
  }
  if (args.addend_repeats < 1 || args.batch % args.addend_repeats != 0) {
    return message(
        "addend_repeats must divide batch, got %lld and %lld", number(args.addend_repeats), number(args.batch));
  }
  if (args.own < args.channels && (args.addend != nullptr || args.scale != nullptr)) {
    return message("there must be no addend, scale or shift beside a skip, got own %lld of %lld channels",
                   number(args.own), number(args.channels));
  }
  if ((args.scale == nullptr) != (args.shift == nullptr)) {
    return message("scale and shift must be given together, got only %s", args.scale == nullptr ? "shift" : "scale");
  }
  if (!(args.eps > 0.0 && args.eps < std::numeric_limits<double>::infinity())) {
    return message("eps must be positive and finite, got %g", args.eps);
  }
  // Blocks are numbered in 32 bits, and so are pixels including those a last part has past the end.
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (args.pixels > kMost / 2 || (args.batch > 0 && args.groups > kMost / args.batch / args.pixels)) {
    return message(
        "batch * groups * pixels must be below 2**31, got %lld * %lld * %lld", number(args.batch), number(args.groups),
        number(args.pixels));
  }
  if (args.batch == 0) return nullptr;
  const struct {
    const char* name;
    const void* data;
    bool needed;
  } tensors[] = {
      {"x", args.x, true}, {"weight", args.weight, true}, {"bias", args.bias, true}, {"out", args.out, true},
      {"skip", args.skip, args.own < args.channels}, {"shared", args.shared, args.kept < args.channels},
      {"addend", args.addend, false}, {"scale", args.scale, false}, {"shift", args.shift, false}};
  for (const auto& tensor : tensors) {
    if (tensor.needed && tensor.data == nullptr) return message("%s must be a device pointer, got null", tensor.name);
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(tensor.data) % element_bytes(args));
    if (past != 0) return message("%s must be aligned to its elements, got an address %d past that", tensor.name, past);
  }
  return nullptr;
}

const char* group_norm_silu_workspace(const GroupNormSilu& args, int64_t* floats) {
  *floats = 0;
  if (const char* text = group_norm_silu_obstacle(args)) return text;
  if (args.batch == 0) return nullptr;
  Device device = {};
  Layout layout = {};
  const cudaError_t error = plan_here(args, device, layout);
  if (error != cudaSuccess) return text_of(error);
  if (!layout.one_pass) *floats = blocks(args, layout) * layout.slab_groups * 2;
  return nullptr;
}

const char* group_norm_silu_forward(const GroupNormSilu& args, float* workspace, void* stream) {
  if (const char* text = group_norm_silu_obstacle(args)) return text;
  if (args.batch == 0) return nullptr;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  Device device = {};
  Problem problem = {args, {}, workspace, Stage::kWhole};
  cudaError_t error = plan_here(args, device, problem.layout);
  if (error != cudaSuccess) return text_of(error);
  if (!problem.layout.one_pass) {
    if (workspace == nullptr) return message("workspace must be a device pointer, got null");
    problem.stage = Stage::kMoments;
    error = launch(problem, device.id, on);
    problem.stage = Stage::kApply;
  }
  if (error == cudaSuccess) error = launch(problem, device.id, on);
  return error == cudaSuccess ? nullptr : text_of(error);
}

}  // namespace difffast::cuda
