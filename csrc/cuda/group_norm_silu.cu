// GroupNorm and SiLU, alone or of a skip beside the hidden state: each pixel read from memory once where that is possible.
//
// A slab is some groups of one row of the batch with all their pixels: one group where pixels are neighbours in memory,
// in channels_last enough groups for whole sectors. The pixels of a slab are spread over several blocks, and each copies
// its part to shared memory and takes mean and M2 of every group there, M2 being the sum of squared differences from the
// mean: two passes, of which the second is free of cancellation. Then
// - the blocks of a slab are one cluster (or the slab is one block's), which exchange their moments and write the
//   result from shared memory: one read and one write, in one launch; or
// - the parts are too large for that: the moments go to a workspace, and a second launch copies the pixels again. It
//   takes the blocks in reverse order, so that it begins with what the L2 cache still has.
// Parts are joined as by Chan, Golub and LeVeque (1979), in a fixed order.

#include "group_norm_silu.h"
#include "primitives.h"

#include <cmath>
#include <limits>

namespace difffast::cuda {
namespace {

// ---- Sizes ----

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;
constexpr int kVectorBytes = 16;
// Blocks that any device with clusters can run together.
constexpr int kMaxCluster = 8;
// More than this must be asked for.
constexpr int kDefaultSharedBytes = 48 * 1024;
// Of pixels in shared memory: what is worth a block of its own, what a block that no other one helps should not exceed
// unless there are slabs for most processors, and what leaves room for several blocks on a processor.
constexpr int kWorthwhileTile = 4 * 1024;
constexpr int kSmallTile = 16 * 1024;
constexpr int kSplitTile = 32 * 1024;
// Of neighbouring channels: whole sectors are 32 bytes, whole cache lines 128.
constexpr int kLineBytes = 128;

constexpr float kLog2E = 1.4426950408889634f;

template <typename Element>
constexpr int kElementBytes = 2;
template <>
constexpr int kElementBytes<Float32> = 4;
template <typename Element>
constexpr int kVector = kVectorBytes / kElementBytes<Element>;

enum class Stage { kWhole, kMoments, kApply };

// How the work is spread, decided on the host.
struct Layout {
  bool one_pass;     // the blocks of a slab are one cluster, which keeps it in shared memory
  int slab_groups;   // of a slab; the last one of a row may have fewer
  int own_slabs;     // of a row of out
  int shared_slabs;  // of a row of shared
  int parts;         // blocks of a slab
  int span;          // pixels of a part; the last ones may have fewer or none
  int threads;
  int tile_bytes;  // of a part of x, and of one of an addend with pixels
  int sums_bytes;  // of the threads' own sums in channels_last
  int shared_bytes;
};

struct Problem {
  GroupNormSilu args;
  Layout layout;
  float* workspace;  // [slabs, parts, slab_groups, 2]: mean and M2
  Stage stage;
};

// ---- Where a block works ----

struct Slab {
  bool shared;  // channels that do not depend on x
  int row;      // of x, or if shared of the skip
  int group, groups;
  int channel, channels;
};

__device__ __forceinline__ Slab slab_at(const Problem& problem, int index) {
  const GroupNormSilu& args = problem.args;
  const Layout& layout = problem.layout;
  const int size = static_cast<int>(args.channels / args.groups);
  const int kept_groups = static_cast<int>(args.kept) / size;
  const int own = static_cast<int>(args.batch) * layout.own_slabs;
  Slab slab;
  slab.shared = index >= own;
  if (slab.shared) index -= own;
  const int of_row = slab.shared ? layout.shared_slabs : layout.own_slabs;
  slab.row = index / of_row;
  slab.group = index % of_row * layout.slab_groups + (slab.shared ? kept_groups : 0);
  slab.groups = min(layout.slab_groups, (slab.shared ? static_cast<int>(args.groups) : kept_groups) - slab.group);
  slab.channel = slab.group * size;
  slab.channels = slab.groups * size;
  return slab;
}

// Rows of a tile in global memory: a row's bytes are neighbours, `stride` is from row to row.
struct Rows {
  char* data;
  int64_t stride;
};

// Pixels from `pixel` on of the channels from `channel` on of a row of [rows, width, pixels].
template <typename Element, bool CHANNELS_LAST>
__device__ __forceinline__ Rows
rows_at(const void* base, int64_t row, int64_t width, int64_t channel, int64_t pixels, int64_t pixel) {
  const int64_t first =
      CHANNELS_LAST ? (row * pixels + pixel) * width + channel : (row * width + channel) * pixels + pixel;
  return {
      const_cast<char*>(static_cast<const char*>(base)) + first * kElementBytes<Element>,
      (CHANNELS_LAST ? width : pixels) * kElementBytes<Element>};
}

// A block's pixels: rows are channels and columns pixels, or in channels_last rows pixels and columns channels. In
// shared memory a row is a whole number of vectors, filled up with zeros.
struct Tile {
  int rows, columns, vectors;
};

// The places of a tile that are a thread's own: (row, column), in steps of rows and columns.
struct Walk {
  int row, column, rows, columns;

  __device__ __forceinline__ explicit Walk(int width) {
    const int threads = blockDim.x, thread = threadIdx.x;
    columns = max(1, min(width, threads));
    rows = threads / columns;
    row = thread / columns;
    // Threads that are left over have no column.
    column = row < rows ? thread % columns : width;
  }
};

// The largest of 16, 8, 4 and 2 bytes that divides all of these.
__device__ __forceinline__ int piece_bytes(uint64_t any) {
  const int bits = static_cast<int>(any | kVectorBytes) & (2 * kVectorBytes - 1);
  return bits & -bits;
}

__device__ __forceinline__ uint64_t bits(const Rows& rows) {
  return reinterpret_cast<uint64_t>(rows.data) | static_cast<uint64_t>(rows.stride);
}

// Starts copying a tile to shared memory, BYTES at a time: its rows (in channels_last the bytes of a row) from `border`
// on come from `more`.
template <typename Element, bool CHANNELS_LAST, int BYTES>
__device__ __forceinline__ void copy_pieces(
    uint32_t to, const Rows& rows, const Rows& more, int border, const Tile& tile) {
  const int width = tile.vectors * (kVectorBytes / BYTES);
  const int filled = tile.columns * kElementBytes<Element> / BYTES;
  const Walk walk(width);
  for (int piece = walk.column; piece < width; piece += walk.columns) {
    for (int row = walk.row; row < tile.rows; row += walk.rows) {
      const bool second = (CHANNELS_LAST ? piece * BYTES : row) >= border, zero = piece >= filled;
      const char* data = second ? more.data : rows.data;
      const int64_t stride = second ? more.stride : rows.stride;
      copy_async<BYTES>(
          to + (row * width + piece) * BYTES, zero ? rows.data : data + row * stride + piece * BYTES, zero);
    }
  }
}

// The same for elements of 2 bytes that lie anywhere: two of them are a word of shared memory.
template <bool CHANNELS_LAST>
__device__ __forceinline__ void copy_elements(
    uint32_t to, const Rows& rows, const Rows& more, int border, const Tile& tile) {
  const int width = tile.vectors * (kVectorBytes / 4);
  const Walk walk(width);
  for (int word = walk.column; word < width; word += walk.columns) {
    for (int row = walk.row; row < tile.rows; row += walk.rows) {
      uint32_t value = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = 2 * word + half;
        const bool second = (CHANNELS_LAST ? 2 * column : row) >= border;
        if (column < tile.columns) {
          const char* place =
              (second ? more.data : rows.data) + row * (second ? more.stride : rows.stride) + 2 * column;
          value |= static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(place)) << (16 * half);
        }
      }
      store_shared(to + (row * width + word) * 4, value);
    }
  }
}

template <typename Element, bool CHANNELS_LAST>
__device__ __forceinline__ void copy_tile(
    uint32_t to, const Rows& rows, const Rows& more, int border, const Tile& tile, int piece) {
  if (piece == 16) {
    copy_pieces<Element, CHANNELS_LAST, 16>(to, rows, more, border, tile);
  } else if (piece == 8) {
    copy_pieces<Element, CHANNELS_LAST, 8>(to, rows, more, border, tile);
  } else if (kElementBytes<Element> == 4 || piece == 4) {
    copy_pieces<Element, CHANNELS_LAST, 4>(to, rows, more, border, tile);
  } else {
    copy_elements<CHANNELS_LAST>(to, rows, more, border, tile);
  }
}

// ---- Vectors and numbers ----

template <typename Element>
__device__ __forceinline__ void unpack_vector(const uint4& vector, float (&values)[kVector<Element>]) {
  const uint32_t words[] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kElementBytes<Element> == 4) {
      values[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = unpack(Element{}, words[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
}

template <typename Element>
__device__ __forceinline__ uint4 pack_vector(const float (&values)[kVector<Element>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kElementBytes<Element> == 4) {
      words[i] = __float_as_uint(values[i]);
    } else {
      words[i] = pack(Element{}, values[2 * i], values[2 * i + 1]);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// Number `index` of an array of elements in global memory.
template <typename Element>
__device__ __forceinline__ float number(const void* data, int64_t index) {
  if constexpr (kElementBytes<Element> == 4) {
    return static_cast<const float*>(data)[index];
  } else {
    return unpack(Element{}, static_cast<const uint16_t*>(data)[index]).x;
  }
}

// The first `bytes` of a vector, `piece` at a time.
__device__ __forceinline__ void store_pieces(char* to, const uint4& vector, int bytes, int piece) {
  const uint32_t words[] = {vector.x, vector.y, vector.z, vector.w};
  if (piece == 16) {
    store_global(reinterpret_cast<uint4*>(to), vector);
  } else if (piece == 8) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (8 * i < bytes) store_global(reinterpret_cast<uint2*>(to) + i, make_uint2(words[2 * i], words[2 * i + 1]));
    }
  } else if (piece == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * i < bytes) store_global(reinterpret_cast<uint32_t*>(to) + i, words[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint16_t half = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
      if (2 * i < bytes) store_global(reinterpret_cast<uint16_t*>(to) + i, half);
    }
  }
}

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

// ---- Kernel ----

// Shared memory, as offsets. The arrays behind the tiles are of floats.
struct Shared {
  uint32_t tile, added_tile;
  uint32_t sums;        // [rows of the walk, elements of a vector, vectors]: a thread's own
  uint32_t centers;     // [channels]: what is subtracted from x, less the group's part while that is not known
  uint32_t gains;       // [channels]
  uint32_t offsets;     // [channels]
  uint32_t warps;       // [two uses, warps or groups if they are more]: sums of warps
  uint32_t references;  // [groups]: first one of the group's numbers, then the mean of the block's
  uint32_t moments;     // [groups, 2]: mean and M2 of the block's pixels
  uint32_t statistics;  // [groups, 2]: mean and 1 / sqrt(var + eps)
};

// How many floats the arrays from `centers` on have.
constexpr int small_floats(int channels, int groups, int warps) {
  return 3 * channels + 2 * (warps > groups ? warps : groups) + 5 * groups;
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
  shared.references = shared.warps + 8 * max(warps, layout.slab_groups);
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
        store_shared(
            shared.sums + ((walk.row * V + e) * tile.vectors + vector) * 4, __float_as_uint(sums[e]));
      } else if (vector * V + e < tile.columns) {
        total += sums[e];
      }
    }
  }
  return total;
}

// Warps that take the sum of one group.
__device__ __forceinline__ int warps_of_group(int groups) { return max(1, static_cast<int>(blockDim.x) / kWarp / groups); }

// From what accumulate() leaves to sums of warps, for group_sum().
template <typename Element, bool CHANNELS_LAST>
__device__ __forceinline__ void reduce(
    const Shared& shared, uint32_t warp_sums, const Tile& tile, int size, int groups, float total) {
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
        store_shared(warp_sums + (group * together + warp % together) * 4, __float_as_uint(total));
      }
    }
  } else {
    total = warp_sum(total);
    if (lane == 0) store_shared(warp_sums + warp * 4, __float_as_uint(total));
  }
  __syncthreads();
}

__device__ __forceinline__ float group_sum(uint32_t warp_sums, int group, int groups) {
  const int together = warps_of_group(groups);
  float total = 0.0f;
  for (int i = 0; i < together; ++i) total += load_shared_float(warp_sums + (group * together + i) * 4);
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
    store_shared(shared.references + group * 4, __float_as_uint(reference));
  }
  __syncthreads();
  const float count = static_cast<float>(size) * static_cast<float>(CHANNELS_LAST ? tile.rows : tile.columns);
  const float share = count > 0.0f ? 1.0f / count : 0.0f;
  float total = accumulate<Element, CHANNELS_LAST, false>(shared, tile, size, added);
  reduce<Element, CHANNELS_LAST>(shared, shared.warps, tile, size, groups, total);
  for (int group = threadIdx.x; group < groups; group += blockDim.x) {
    const float mean =
        load_shared_float(shared.references + group * 4) + group_sum(shared.warps, group, groups) * share;
    store_shared(shared.references + group * 4, __float_as_uint(mean));
  }
  __syncthreads();
  total = accumulate<Element, CHANNELS_LAST, true>(shared, tile, size, added);
  const uint32_t second = shared.warps + (shared.references - shared.warps) / 2;
  reduce<Element, CHANNELS_LAST>(shared, second, tile, size, groups, total);
  for (int group = threadIdx.x; group < groups; group += blockDim.x) {
    store_shared(
        shared.moments + group * 8, __float_as_uint(load_shared_float(shared.references + group * 4)));
    store_shared(shared.moments + group * 8 + 4, __float_as_uint(group_sum(second, group, groups)));
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
      store_shared(statistics + group * 8, __float_as_uint(mean));
      store_shared(
          statistics + group * 8 + 4, __float_as_uint(1.0f / sqrtf(variance + static_cast<float>(args.eps))));
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
    store_shared(shared.centers + c * 4, __float_as_uint(center));
    store_shared(shared.gains + c * 4, __float_as_uint(gain));
    store_shared(shared.offsets + c * 4, __float_as_uint(offset));
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
  if (from_x == slab.channels) more = rows;
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
    store_shared(shared.centers + c * 4, __float_as_uint(center));
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
    if (problem.stage == Stage::kApply) return of_slab[(part * layout.slab_groups + group) * 2 + which];
    const uint32_t place = shared.moments + group * 8 + which * 4;
    return cluster ? load_cluster_float(place, part) : load_shared_float(place);
  });
  // No block may end while another one still reads its moments.
  if (cluster) cluster_arrive();
  __syncthreads();
  make_coefficients<Element>(args, shared, slab, size);
  wait_copies<0>();
  __syncthreads();
  write<Element, CHANNELS_LAST>(args, shared, tile, out, added, write_piece);
  if (cluster) cluster_wait();
}

// ---- Host ----

struct Device {
  int multiprocessors;
  int shared_bytes;  // that a block may have
  int cluster;       // blocks that a cluster may have; 1: there are none
};

cudaError_t current_device(Device& device) {
  int id = 0, clusters = 0;
  cudaError_t error = cudaGetDevice(&id);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, id);
  };
  read(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(clusters, cudaDevAttrClusterLaunch);
  // A small partition of a device may not have processors for a whole cluster.
  device.cluster = error == cudaSuccess && clusters != 0 && device.multiprocessors >= 2 * kMaxCluster ? kMaxCluster : 1;
  return error;
}

int element_bytes(const GroupNormSilu& args) { return args.dtype == ElementType::kFloat32 ? 4 : 2; }

int round_up(int64_t a, int b) { return divide_up(a, b) * b; }

// Sets how the pixels of slabs are spread over blocks, and with that the sizes in shared memory.
void set_span(Layout& layout, const GroupNormSilu& args, int span) {
  const int size = static_cast<int>(args.channels / args.groups), vector = kVectorBytes / element_bytes(args);
  const int channels = layout.slab_groups * size;
  layout.span = args.channels_last ? span : round_up(span, vector);
  const int width = divide_up(args.channels_last ? channels : layout.span, vector);
  const int vectors = (args.channels_last ? layout.span : size) * width;
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

Layout plan(const GroupNormSilu& args, const Device& device) {
  Layout layout = {};
  const int size = static_cast<int>(args.channels / args.groups), kept_groups = static_cast<int>(args.kept) / size;
  const int rest = static_cast<int>(args.groups) - kept_groups;
  const auto slabs = [&](int groups) {
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
           slabs(2 * layout.slab_groups) * kMaxCluster >= device.multiprocessors) {
      layout.slab_groups *= 2;
    }
  }
  layout.own_slabs = divide_up(kept_groups, layout.slab_groups);
  layout.shared_slabs = divide_up(rest, layout.slab_groups);
  const int64_t all = slabs(layout.slab_groups);

  // One pass: more blocks for a slab until two fit into a processor and all processors have one.
  for (layout.parts = 1; layout.parts <= device.cluster; layout.parts *= 2) {
    const int span = divide_up(args.pixels, layout.parts);
    set_span(layout, args, span);
    const bool last = 2 * layout.parts > device.cluster;
    const bool spread = all * layout.parts >= device.multiprocessors || layout.tile_bytes < 2 * kWorthwhileTile;
    layout.one_pass = layout.shared_bytes <= (last ? device.shared_bytes : device.shared_bytes / 2) && (spread || last);
    if (device.cluster == 1 && 2 * all < device.multiprocessors && layout.tile_bytes > kSmallTile) {
      layout.one_pass = false;
    }
    if (layout.one_pass) return layout;
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
  return layout;
}

int64_t blocks(const GroupNormSilu& args, const Layout& layout) {
  return (args.batch * layout.own_slabs + args.batch / args.repeats * layout.shared_slabs) * layout.parts;
}

template <typename Element, bool CHANNELS_LAST>
cudaError_t launch_kernel(const Problem& problem, cudaStream_t stream) {
  const auto kernel = norm_kernel<Element, CHANNELS_LAST>;
  const Layout& layout = problem.layout;
  if (layout.shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, layout.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = layout.parts;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks(problem.args, layout)));
  config.blockDim = dim3(layout.threads);
  config.dynamicSmemBytes = layout.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = problem.stage == Stage::kWhole && layout.parts > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, problem);
}

template <typename Element>
cudaError_t launch_for_layout(const Problem& problem, cudaStream_t stream) {
  return problem.args.channels_last ? launch_kernel<Element, true>(problem, stream)
                                    : launch_kernel<Element, false>(problem, stream);
}

cudaError_t launch(const Problem& problem, cudaStream_t stream) {
  switch (problem.args.dtype) {
    case ElementType::kFloat16: return launch_for_layout<Float16>(problem, stream);
    case ElementType::kBFloat16: return launch_for_layout<BFloat16>(problem, stream);
    default: return launch_for_layout<Float32>(problem, stream);
  }
}

const char* text_of(cudaError_t error) {
  // Taken from the runtime too, so that the next call does not report it again.
  cudaGetLastError();
  return cudaGetErrorString(error);
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
  Device device = {};
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return text_of(error);
  const Layout layout = plan(args, device);
  if (!layout.one_pass) *floats = blocks(args, layout) * layout.slab_groups * 2;
  return nullptr;
}

const char* group_norm_silu_forward(const GroupNormSilu& args, float* workspace, void* stream) {
  if (const char* text = group_norm_silu_obstacle(args)) return text;
  if (args.batch == 0) return nullptr;
  Device device = {};
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return text_of(error);
  Problem problem = {args, plan(args, device), workspace, Stage::kWhole};
  if (!problem.layout.one_pass) {
    if (workspace == nullptr) return message("workspace must be a device pointer, got null");
    problem.stage = Stage::kMoments;
    error = launch(problem, static_cast<cudaStream_t>(stream));
    problem.stage = Stage::kApply;
  }
  if (error == cudaSuccess) error = launch(problem, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : text_of(error);
}

}  // namespace difffast::cuda
