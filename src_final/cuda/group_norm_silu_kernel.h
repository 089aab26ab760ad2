// GroupNorm and SiLU, alone or of a skip beside the hidden state: pixels are read from memory once where that is
// possible.
//
// A slab is some groups of one row of the batch with all their pixels: one group where pixels are neighbours in memory,
// in channels_last enough groups for whole sectors. The pixels of a slab are spread over several blocks; each copies
// its part to shared memory and takes mean and M2 of every group there, M2 being the sum of squared differences from
// the mean: two passes, of which the second is free of cancellation. Then
// - the blocks of a slab are one cluster (or the slab is one block's), which exchange their moments and write the
//   result from shared memory: one read and one write, in one launch; or
// - the parts are too large for that: the moments go to a workspace, and a second launch copies the pixels again. It
//   takes the blocks in reverse order, so that it begins with what the L2 cache still has.
// Parts are joined as by Chan, Golub and LeVeque (1979), in a fixed order.

#pragma once

#include <cmath>

#include "group_norm_silu_tile.h"

namespace difffast::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

// u * sigmoid(u). The fast functions are far more exact than 16-bit results, not than float32.
template <typename Element>
__device__ __forceinline__ float silu(float u) {
  if constexpr (kElementBytes<Element> == 4) {
    return u / (1.0f + expf(-u));
  } else {
    return u * reciprocal_fast(1.0f + exp2_fast(-kLog2E * u));
  }
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Shared memory, as offsets. The arrays behind the tiles are of floats.
struct Shared {
  uint32_t tile, added_tile;
  uint32_t sums;        // [rows of the walk, elements of a vector, vectors]: a thread's own
  uint32_t centers;     // [channels]: what is subtracted from x, less the group's part while that is not known
  uint32_t gains;       // [channels]
  uint32_t offsets;     // [channels]
  uint32_t warps;       // [warps, or groups if they are more]: sums of warps
  uint32_t references;  // [groups]: first one of the group's numbers, then the mean of the block's
  uint32_t moments;     // [groups, 2]: mean and M2 of the block's pixels
  uint32_t statistics;  // [groups, 2]: mean and 1 / sqrt(var + eps)
};

// How many floats the arrays from `centers` on have.
constexpr int small_floats(int channels, int groups, int warps) {
  return 3 * channels + (warps > groups ? warps : groups) + 5 * groups;
}

__device__ __forceinline__ Shared places(const Layout& layout, int size, bool added) {
  const int channels = layout.slab_groups * size, warps = layout.threads / kWarp;
  Shared shared;
  shared.tile = shared_base();
  shared.added_tile = shared.tile + layout.tile_bytes;
  shared.sums = shared.added_tile + (added ? layout.tile_bytes : 0);
  shared.centers = shared.sums + layout.sums_bytes;
  shared.gains = shared.centers + 4 * channels;
  shared.offsets = shared.gains + 4 * channels;
  shared.warps = shared.offsets + 4 * channels;
  shared.references = shared.warps + 4 * max(warps, layout.slab_groups);
  shared.moments = shared.references + 4 * layout.slab_groups;
  shared.statistics = shared.moments + 8 * layout.slab_groups;
  return shared;
}

// Number `index` of an array of elements in shared memory.
template <typename Element>
__device__ __forceinline__ float shared_number(uint32_t array, int index) {
  const float word = load_shared_float(array + index * kElementBytes<Element> / 4 * 4);
  if constexpr (kElementBytes<Element> == 4) {
    return word;
  } else {
    const float2 pair = unpack(Element{}, __float_as_uint(word));
    return index % 2 == 0 ? pair.x : pair.y;
  }
}

// A vector of x + addend.
template <typename Element>
__device__ __forceinline__ void load_vector(
    const Shared& shared, int place, bool added, float (&values)[kVector<Element>]) {
  unpack_vector<Element>(load_shared(shared.tile + place * kVectorBytes), values);
  if (added) {
    float more[kVector<Element>];
    unpack_vector<Element>(load_shared(shared.added_tile + place * kVectorBytes), more);
#pragma unroll
    for (int e = 0; e < kVector<Element>; ++e) values[e] += more[e];
  }
}

// Sums of a thread's numbers less the group's reference, or of their squares: in channels_last by column to
// shared.sums, else of all.
template <typename Element, bool CHANNELS_LAST, bool SQUARES>
__device__ __forceinline__ float accumulate(const Shared& shared, const Tile& tile, int size, bool added) {
  constexpr int V = kVector<Element>;
  const Walk walk(tile.vectors);
  float total = 0.0f;
  for (int vector = walk.column; vector < tile.vectors; vector += walk.columns) {
    float sums[V], centers[V];
#pragma unroll
    for (int e = 0; e < V; ++e) {
      sums[e] = 0.0f;
      if constexpr (CHANNELS_LAST) {
        const int column = min(vector * V + e, tile.columns - 1);
        centers[e] = load_shared_float(shared.references + column / size * 4) +
                     load_shared_float(shared.centers + column * 4);
      }
    }
    for (int row = walk.row; row < tile.rows; row += walk.rows) {
      float values[V];
      load_vector<Element>(shared, row * tile.vectors + vector, added, values);
      float center = 0.0f;
      if constexpr (!CHANNELS_LAST) {
        center = load_shared_float(shared.references) + load_shared_float(shared.centers + row * 4);
      }
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float apart = values[e] - (CHANNELS_LAST ? centers[e] : center);
        sums[e] = SQUARES ? fmaf(apart, apart, sums[e]) : sums[e] + apart;
      }
    }
#pragma unroll
    for (int e = 0; e < V; ++e) {
      if constexpr (CHANNELS_LAST) {
        store_shared_float(shared.sums + ((walk.row * V + e) * tile.vectors + vector) * 4, sums[e]);
      } else if (vector * V + e < tile.columns) {
        total += sums[e];
      }
    }
  }
  return total;
}

// Warps that take the sum of one group.
__device__ __forceinline__ int warps_of_group(int groups) {
  return max(1, static_cast<int>(blockDim.x) / kWarp / groups);
}

// From what accumulate() leaves to sums of warps, for group_sum().
template <typename Element, bool CHANNELS_LAST>
__device__ __forceinline__ void reduce(
    const Shared& shared, const Tile& tile, int size, int groups, float total) {
  constexpr int V = kVector<Element>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if constexpr (CHANNELS_LAST) {
    __syncthreads();
    const Walk walk(tile.vectors);
    const int warps = blockDim.x / kWarp, together = warps_of_group(groups), step = together * kWarp;
    for (int group = warp / together; group < groups; group += warps / together) {
      int row = (warp % together * kWarp + lane) / size, channel = (warp % together * kWarp + lane) % size;
      total = 0.0f;
      while (row < walk.rows) {
        const int column = group * size + channel;
        total += load_shared_float(shared.sums + ((row * V + column % V) * tile.vectors + column / V) * 4);
        row += step / size;
        channel += step % size;
        if (channel >= size) {
          channel -= size;
          ++row;
        }
      }
      total = warp_sum(total);
      if (lane == 0) {
        store_shared_float(shared.warps + (group * together + warp % together) * 4, total);
      }
    }
  } else {
    total = warp_sum(total);
    if (lane == 0) store_shared_float(shared.warps + warp * 4, total);
  }
  __syncthreads();
}

__device__ __forceinline__ float group_sum(const Shared& shared, int group, int groups) {
  const int together = warps_of_group(groups);
  float total = 0.0f;
  for (int i = 0; i < together; ++i) total += load_shared_float(shared.warps + (group * together + i) * 4);
  return total;
}

// Mean and M2 of every group in the block's pixels, to shared.moments; 0 without pixels.
template <typename Element, bool CHANNELS_LAST>
__device__ __forceinline__ void take_moments(
    const Shared& shared, const Tile& tile, int size, int groups, bool added) {
  // Sums of differences from any number of the group are as small as the group's spread.
  for (int group = threadIdx.x; group < groups; group += blockDim.x) {
    float reference = 0.0f;
    if (tile.rows > 0 && tile.columns > 0) {
      reference = shared_number<Element>(shared.tile, group * size);
      if (added) reference += shared_number<Element>(shared.added_tile, group * size);
    }
    store_shared_float(shared.references + group * 4, reference);
  }
  __syncthreads();
  const float count = static_cast<float>(size) * static_cast<float>(CHANNELS_LAST ? tile.rows : tile.columns);
  const float share = count > 0.0f ? 1.0f / count : 0.0f;
  float total = accumulate<Element, CHANNELS_LAST, false>(shared, tile, size, added);
  reduce<Element, CHANNELS_LAST>(shared, tile, size, groups, total);
  for (int group = threadIdx.x; group < groups; group += blockDim.x) {
    const float mean =
        load_shared_float(shared.references + group * 4) + group_sum(shared, group, groups) * share;
    store_shared_float(shared.references + group * 4, mean);
  }
  __syncthreads();
  total = accumulate<Element, CHANNELS_LAST, true>(shared, tile, size, added);
  reduce<Element, CHANNELS_LAST>(shared, tile, size, groups, total);
  for (int group = threadIdx.x; group < groups; group += blockDim.x) {
    store_shared_float(shared.moments + group * 8, load_shared_float(shared.references + group * 4));
    store_shared_float(shared.moments + group * 8 + 4, group_sum(shared, group, groups));
  }
}

// Joins the parts' moments, moment(part, group, 0) being a mean and moment(part, group, 1) an M2, to the statistics of
// every group; a warp takes a group.
template <typename Moment>
__device__ __forceinline__ void join(
    const Problem& problem, uint32_t statistics, int groups, Moment moment) {
  const GroupNormSilu& args = problem.args;
  const Layout& layout = problem.layout;
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const float pixels = static_cast<float>(args.pixels), size = static_cast<float>(args.channels / args.groups);
  const auto pixels_of = [&](int part) {
    const int64_t left = args.pixels - static_cast<int64_t>(part) * layout.span;
    return left <= 0 ? 0.0f : static_cast<float>(left < layout.span ? left : layout.span);
  };
  for (int group = warp; group < groups; group += warps) {
    // Differences of the means are as small as the group's spread; the first part always has pixels.
    const float first = moment(0, group, 0);
    float mean = 0.0f;
    for (int part = lane; part < layout.parts; part += kWarp) {
      const float some = pixels_of(part);
      if (some > 0.0f) mean += some * (moment(part, group, 0) - first);
    }
    mean = first + warp_sum(mean) / pixels;
    float squares = 0.0f;
    for (int part = lane; part < layout.parts; part += kWarp) {
      const float some = pixels_of(part), apart = moment(part, group, 0) - mean;
      if (some > 0.0f) squares += moment(part, group, 1) + size * some * apart * apart;
    }
    squares = warp_sum(squares);
    if (lane == 0) {
      const float variance = squares / (size * pixels);
      store_shared_float(statistics + group * 8, mean);
      store_shared_float(statistics + group * 8 + 4, 1.0f / sqrtf(variance + static_cast<float>(args.eps)));
    }
  }
}

// Center, gain and offset of every channel, of the group's statistics: u = (x + addend - center) * gain + offset, where
// the center has an addend of one number per channel in it.
template <typename Element>
__device__ __forceinline__ void make_coefficients(
    const GroupNormSilu& args, const Shared& shared, const Slab& slab, int size) {
  for (int c = threadIdx.x; c < slab.channels; c += blockDim.x) {
    const int64_t channel = slab.channel + c, place = slab.row * args.channels + channel;
    const uint32_t statistics = shared.statistics + c / size * 8;
    float gain = load_shared_float(statistics + 4) * number<Element>(args.weight, channel);
    float offset = number<Element>(args.bias, channel);
    if (args.scale != nullptr) {
      const float factor = 1.0f + number<Element>(args.scale, place);
      gain *= factor;
      offset = fmaf(offset, factor, number<Element>(args.shift, place));
    }
    const float center = load_shared_float(statistics) + load_shared_float(shared.centers + c * 4);
    store_shared_float(shared.centers + c * 4, center);
    store_shared_float(shared.gains + c * 4, gain);
    store_shared_float(shared.offsets + c * 4, offset);
  }
}

template <typename Element, bool CHANNELS_LAST>
__device__ __forceinline__ void write(
    const GroupNormSilu& args, const Shared& shared, const Tile& tile, const Rows& out, bool added, int piece) {
  constexpr int V = kVector<Element>;
  const Walk walk(tile.vectors);
  for (int vector = walk.column; vector < tile.vectors; vector += walk.columns) {
    float centers[V], gains[V], offsets[V];
    const auto load = [&](int e, int channel) {
      centers[e] = load_shared_float(shared.centers + channel * 4);
      gains[e] = load_shared_float(shared.gains + channel * 4);
      offsets[e] = load_shared_float(shared.offsets + channel * 4);
    };
    if constexpr (CHANNELS_LAST) {
#pragma unroll
      for (int e = 0; e < V; ++e) load(e, min(vector * V + e, tile.columns - 1));
    }
    const int bytes = (tile.columns - vector * V) * kElementBytes<Element>;
    for (int row = walk.row; row < tile.rows; row += walk.rows) {
      float values[V];
      load_vector<Element>(shared, row * tile.vectors + vector, added, values);
      if constexpr (!CHANNELS_LAST) load(0, row);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const int i = CHANNELS_LAST ? e : 0;
        values[e] = fmaf(values[e] - centers[i], gains[i], offsets[i]);
        if (args.silu) values[e] = silu<Element>(values[e]);
      }
      store_pieces(out.data + row * out.stride + vector * kVectorBytes, pack_vector<Element>(values), bytes, piece);
    }
  }
}

// 64 registers a thread, so that one block of a processor can read while another one writes.
template <typename Element, bool CHANNELS_LAST>
__global__ void __launch_bounds__(kMaxThreads, 2) norm_kernel(const Problem problem) {
  constexpr int V = kVector<Element>;
  const GroupNormSilu& args = problem.args;
  const Layout& layout = problem.layout;
  const int index = problem.stage == Stage::kApply ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int part = index % layout.parts;
  const Slab slab = slab_at(problem, index / layout.parts);
  const int size = static_cast<int>(args.channels / args.groups);
  const bool added = args.addend != nullptr && !args.addend_by_channel;
  const bool cluster = problem.stage == Stage::kWhole && layout.parts > 1;
  const Shared shared = places(layout, size, added);

  const int64_t start = static_cast<int64_t>(part) * layout.span;
  const int pixels = args.pixels <= start ? 0 : static_cast<int>(min(args.pixels - start, int64_t{layout.span}));
  Tile tile;
  tile.rows = CHANNELS_LAST ? pixels : slab.channels;
  tile.columns = CHANNELS_LAST ? slab.channels : pixels;
  tile.vectors = (tile.columns + V - 1) / V;

  // Channels of x come before those of the skip.
  const auto rows_of = [&](const void* base, int64_t row, int64_t width, int64_t channel) {
    return rows_at<Element, CHANNELS_LAST>(base, row, width, channel, args.pixels, start);
  };
  const int from_x = static_cast<int>(max(int64_t{0}, min(args.own - slab.channel, int64_t{slab.channels})));
  const int border = CHANNELS_LAST ? from_x * kElementBytes<Element> : from_x;
  Rows rows = {}, more = {};
  if (from_x < slab.channels) {
    const int64_t row = slab.shared ? slab.row : slab.row / args.repeats;
    more = rows_of(args.skip, row, args.channels - args.own, slab.channel + from_x - args.own);
    // As if the skip's channels had begun where x's did.
    more.data -= CHANNELS_LAST ? border : from_x * more.stride;
    rows = more;
  }
  if (from_x > 0) rows = rows_of(args.x, slab.row, args.own, slab.channel);
  const Rows out = slab.shared ? rows_of(args.shared, slab.row, args.channels - args.kept, slab.channel - args.kept)
                               : rows_of(args.out, slab.row, args.kept, slab.channel);
  const uint64_t columns_bits = static_cast<uint64_t>(tile.columns) * kElementBytes<Element>;
  const int read_piece = piece_bytes(bits(rows) | bits(more) | columns_bits | (CHANNELS_LAST ? border : 0));
  const int write_piece = piece_bytes(bits(out) | columns_bits);

  copy_tile<Element, CHANNELS_LAST>(shared.tile, rows, more, border, tile, read_piece);
  if (added) {
    const Rows addend = rows_of(args.addend, slab.row / args.addend_repeats, args.channels, slab.channel);
    const int piece = piece_bytes(bits(addend) | columns_bits);
    const int whole = CHANNELS_LAST ? tile.columns * kElementBytes<Element> : tile.rows;
    copy_tile<Element, CHANNELS_LAST>(shared.added_tile, addend, addend, whole, tile, piece);
  }
  commit_copies();
  for (int c = threadIdx.x; c < slab.channels; c += blockDim.x) {
    float center = 0.0f;
    if (args.addend != nullptr && args.addend_by_channel) {
      center = -number<Element>(args.addend, slab.row / args.addend_repeats * args.channels + slab.channel + c);
    }
    store_shared_float(shared.centers + c * 4, center);
  }

  float* const of_slab =
      problem.workspace + static_cast<int64_t>(index / layout.parts) * layout.parts * layout.slab_groups * 2;
  if (problem.stage != Stage::kApply) {
    wait_copies<0>();
    __syncthreads();
    take_moments<Element, CHANNELS_LAST>(shared, tile, size, slab.groups, added);
    __syncthreads();
  }
  if (problem.stage == Stage::kMoments) {
    for (int i = threadIdx.x; i < slab.groups * 2; i += blockDim.x) {
      store_global(of_slab + part * layout.slab_groups * 2 + i, load_shared_float(shared.moments + i * 4));
    }
    return;
  }
  if (cluster) {
    cluster_arrive();
    cluster_wait();
  }
  join(problem, shared.statistics, slab.groups, [&](int part, int group, int which) {
    if (problem.stage == Stage::kApply) {
      return load_global(of_slab + (part * layout.slab_groups + group) * 2 + which);
    }
    const uint32_t place = shared.moments + group * 8 + which * 4;
    return cluster ? load_cluster_float(place, part) : load_shared_float(place);
  });
  __syncthreads();
  // No block may end while another one still reads its moments.
  if (cluster) cluster_arrive_relaxed();
  make_coefficients<Element>(args, shared, slab, size);
  wait_copies<0>();
  __syncthreads();
  write<Element, CHANNELS_LAST>(args, shared, tile, out, added, write_piece);
  if (cluster) cluster_wait();
}

}  // namespace
}  // namespace difffast::cuda
