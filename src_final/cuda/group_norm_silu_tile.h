// Where a block of the norm's kernel works: its rectangle of channels and pixels, how that comes to shared memory and
// goes back, and what its numbers are.
#pragma once

#include "group_norm_silu.h"
#include "primitives.h"

namespace difffast::cuda {
namespace {

// ---- Sizes ----

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;
constexpr int kVectorBytes = 16;

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
          value |= static_cast<uint32_t>(load_global(reinterpret_cast<const uint16_t*>(place))) << (16 * half);
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
    return load_global(static_cast<const float*>(data) + index);
  } else {
    return unpack(Element{}, load_global(static_cast<const uint16_t*>(data) + index)).x;
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

}  // namespace
}  // namespace difffast::cuda
