// Cross attention over at most 128 text keys: all keys of a head fit one tile, so that the softmax needs one pass.
//
// A block holds K and V of one head in shared memory; each of its warps owns 16 or 32 queries at a time and computes
//   scores (tensor cores) -> softmax (float32, in registers) -> output (tensor cores) -> 16-byte stores,
// with the next rows of q on their way meanwhile. Without maps a block keeps its head and walks over query tiles;
// with maps it keeps its query tile and walks over some of the heads, adding up probabilities in registers. If these
// are not all heads, the sums go to a workspace, and a second kernel adds them up in a fixed order.
//
// The operation is limited by reading q and writing out, so what the code spares is traffic: a fragment of K or V read
// from shared memory serves all rows of a warp, and head_dim is a run-time number (padded to 16, not to a power of
// two): no register array depends on it, since the output is computed 32 columns at a time.

#include "cross_attention.h"
#include "device.h"
#include "primitives.h"

#include <cmath>
#include <limits>

namespace difffast::cuda {
namespace {

// ---- Sizes ----

constexpr int kWarp = 32;
constexpr int kMaxWarps = 4;
constexpr int kMaxKeys = 128;
constexpr int kMaxHeadDim = 256;
// What a block of compute capability 8.6 and 8.9 may have; 8.0 and 9.0 allow more, but then fewer blocks at a time.
constexpr int kMaxSharedBytes = 99 * 1024;
constexpr int kPieceBytes = 16;
constexpr int kPieceElements = 8;
// The output passes through shared memory 32 columns at a time; the gap keeps rows on different banks.
constexpr int kStagePitch = 32 * 2 + kPieceBytes;

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// 16-row tiles a warp owns: two halve the reads of K and V, one leaves enough registers for 128 keys or for the sums of
// maps.
constexpr int row_tiles(int groups, bool maps) { return groups <= 5 && !maps ? 2 : 1; }
template <int GROUPS, bool MAPS>
constexpr int kRowTiles = row_tiles(GROUPS, MAPS);
// Blocks that a multiprocessor must have room for: with maps no more than 168 registers a thread; without, ptxas stays
// below that by itself (0: it may choose).
template <bool MAPS>
constexpr int kBlocksTogether = MAPS ? 3 : 0;

// The kernel exists for these numbers of 16-key groups; fewer keys use the next one and masks. 5 is the usual 77.
constexpr int kGroups[] = {1, 2, 4, 5, 8};

constexpr int smaller_groups(int groups) {
  int smaller = 0;
  for (int candidate : kGroups) {
    if (candidate < groups) smaller = candidate;
  }
  return smaller;
}
template <int GROUPS>
constexpr int kSmallerGroups = smaller_groups(GROUPS);

// How the work is spread, decided on the host.
struct Layout {
  int groups;         // 16-key groups a tile of K or V has
  int warps;          // of a block
  int tiles;          // query tiles, of warps * 16 * row_tiles(groups, maps) queries each
  int tiles_a_block;  // consecutive query tiles a block without maps walks over
  int splits;         // blocks a head's tiles are spread over (1 tile each with maps)
  int heads_a_block;  // consecutive heads a block with maps walks over
  int head_groups;    // blocks the heads of a query tile are spread over
  int padded_dim;     // head_dim rounded up to 16
  int pitch;          // bytes from row to row of K, V and q in shared memory: an odd number of pieces, so that the
                      // eight rows of a matrix that ldmatrix reads lie on different banks
  int shared_bytes;
  bool one_buffer;  // V replaces K in shared memory, for heads too wide for both
};

struct Problem {
  CrossAttentionArgs args;
  Layout layout;
  float* map_sums;  // [head groups, batch, queries, map_count]; the maps themselves where there is one group
};

// ---- Kernel ----

// Where a thread begins in a tile of 16-byte pieces, and how it goes on, `threads` pieces at a time in row-major order.
struct Walk {
  int row, piece, row_step, piece_step;

  __device__ __forceinline__ Walk(int thread, int threads, int pieces)
      : row(thread / pieces), piece(thread % pieces), row_step(threads / pieces), piece_step(threads % pieces) {}
};

// Starts copying rows [first, first + rows) of the matrix at `from` to shared memory. Rows from `limit` on and pieces
// past head_dim become zeros: they then add nothing to any product, whatever lay there before.
__device__ __forceinline__ void copy_rows(
    uint32_t to, const void* from, int64_t stride, int first, int rows, int limit, const Walk& walk,
    const Problem& problem) {
  const int pieces = problem.layout.padded_dim / kPieceElements;
  const int filled = problem.args.head_dim / kPieceElements;
  const int pitch = problem.layout.pitch;
  limit -= first;
  int row = walk.row, piece = walk.piece;
  // Addresses go forward with the walk: by a step, and from a row's end to the beginning of the next.
  const char* source = static_cast<const char*>(from) + (first + row) * stride * 2 + piece * kPieceBytes;
  const int64_t source_step = walk.row_step * stride * 2 + walk.piece_step * kPieceBytes;
  const int64_t source_wrap = stride * 2 - pieces * kPieceBytes;
  to += row * pitch + piece * kPieceBytes;
  const uint32_t to_step = walk.row_step * pitch + walk.piece_step * kPieceBytes;
  const uint32_t to_wrap = pitch - pieces * kPieceBytes;
  while (row < rows) {
    const bool zero = row >= limit || piece >= filled;
    copy_async(to, zero ? from : source, zero);
    row += walk.row_step;
    piece += walk.piece_step;
    source += source_step;
    to += to_step;
    if (piece >= pieces) {
      ++row;
      piece -= pieces;
      source += source_wrap;
      to += to_wrap;
    }
  }
}

__device__ __forceinline__ const void* matrix(
    const void* base, const CrossAttentionStrides& strides, int batch, int head) {
  return static_cast<const char*>(base) + (batch * strides.batch + head * strides.head) * 2;
}

__device__ __forceinline__ void wait_for_older(bool one_buffer) {
  if (one_buffer) {
    wait_copies<0>();
  } else {
    wait_copies<1>();
  }
}

// scores = q k^T for a warp's rows, not yet scaled. Lane l holds of every 16x8 tile the elements
// (l / 4, 2 * (l % 4) + {0, 1}) and (l / 4 + 8, the same columns).
template <typename Element, int GROUPS, int TILES>
__device__ __forceinline__ void multiply_keys(
    float (&scores)[TILES][2 * GROUPS][4], uint32_t q_lane, uint32_t k_lane, int pitch, int padded_dim) {
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
#pragma unroll
    for (int j = 0; j < 2 * GROUPS; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[i][j][e] = 0.0f;
    }
  }
#pragma unroll 1
  for (int step = 0; step < padded_dim; step += 16) {
    uint32_t q[TILES][4];
#pragma unroll
    for (int i = 0; i < TILES; ++i) load_matrices(q[i], q_lane + i * 16 * pitch + step * 2);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      uint32_t k[4];
      load_matrices(k, k_lane + g * 16 * pitch + step * 2);
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        multiply_add(Element{}, scores[i][2 * g], q[i], k[0], k[1]);
        multiply_add(Element{}, scores[i][2 * g + 1], q[i], k[2], k[3]);
      }
    }
  }
}

// Sum or maximum over the four lanes that share rows; all of them receive it.
template <typename Combine>
__device__ __forceinline__ float over_row(float value, Combine combine) {
  value = combine(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return combine(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

// Turns the scores of 16 rows into exp(scale * score - maximum), zero for keys that do not exist, and gives the
// denominator of rows l / 4 and l / 4 + 8.
template <int GROUPS>
__device__ __forceinline__ void exponentiate(
    float (&scores)[2 * GROUPS][4], float (&sum)[2], const CrossAttentionArgs& args, int lane) {
  const float scale = args.scale * kLog2E;
  const int column = 2 * (lane % 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = -kInfinity;
#pragma unroll
    for (int j = 0; j < 2 * GROUPS; ++j) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        // Fewer keys than the next smaller kernel's would have gone to that one.
        if (j >= 2 * kSmallerGroups<GROUPS> && 8 * j + column + e % 2 >= args.keys) scores[j][e] = -kInfinity;
        largest = fmaxf(largest, scores[j][e]);
      }
    }
    // The scale is positive: the largest score stays the largest.
    largest = over_row(largest, [](float a, float b) { return fmaxf(a, b); }) * scale;
    if (args.sink > 0) largest = fmaxf(largest, 0.0f);
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < 2 * GROUPS; ++j) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        scores[j][e] = exp2_fast(fmaf(scores[j][e], scale, -largest));
        total += scores[j][e];
      }
    }
    total = over_row(total, [](float a, float b) { return a + b; });
    if (args.sink > 0) total += static_cast<float>(args.sink) * exp2_fast(-largest);
    sum[half] = total;
  }
}

// Columns [column, column + 16 * PAIRS) of the output of a warp's rows: probabilities times V, through shared memory
// to 16-byte stores.
template <typename Element, int PAIRS, int GROUPS, int TILES>
__device__ __forceinline__ void output_columns(
    const uint32_t (&weights)[TILES][GROUPS][4], const float (&inverse)[TILES][2], uint32_t v_lane, uint32_t stage,
    char* out, int column, int rows, int lane, const Problem& problem) {
  float sums[TILES][2 * PAIRS][4] = {};
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
      uint32_t v[4];
      load_matrices_transposed(v, v_lane + g * 16 * problem.layout.pitch + (column + 16 * pair) * 2);
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        multiply_add(Element{}, sums[i][2 * pair], weights[i][g], v[0], v[1]);
        multiply_add(Element{}, sums[i][2 * pair + 1], weights[i][g], v[2], v[3]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
#pragma unroll
    for (int j = 0; j < 2 * PAIRS; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = inverse[i][half];
        store_shared(
            stage + (16 * i + 8 * half + lane / 4) * kStagePitch + j * kPieceBytes + lane % 4 * 4,
            pack(Element{}, sums[i][j][2 * half] * factor, sums[i][j][2 * half + 1] * factor));
      }
    }
  }
  __syncwarp();
  constexpr int kPieces = 2 * PAIRS;
#pragma unroll
  for (int i = 0; i < 16 * TILES * kPieces / kWarp; ++i) {
    const int row = (i * kWarp + lane) / kPieces;
    const int piece = lane % kPieces;
    const uint4 value = load_shared(stage + row * kStagePitch + piece * kPieceBytes);
    if (row < rows && column + piece * kPieceElements < problem.args.head_dim) {
      char* to = out + (row * problem.args.out_strides.row + column) * 2 + piece * kPieceBytes;
      store_global(reinterpret_cast<uint4*>(to), value);
    }
  }
  __syncwarp();
}

template <typename Element, int GROUPS, bool MAPS>
__global__ void __launch_bounds__(kMaxWarps * kWarp, kBlocksTogether<MAPS>) forward_kernel(const Problem problem) {
  constexpr int kTiles = kRowTiles<GROUPS, MAPS>;
  constexpr int kRows = 16 * kTiles;
  constexpr int kKeys = 16 * GROUPS;
  const CrossAttentionArgs& args = problem.args;
  const Layout& layout = problem.layout;
  const int pitch = layout.pitch;
  const int warps = blockDim.x / kWarp;
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;

  // Heads change fastest: neighbouring blocks then read neighbouring bytes of a [B, N, H * d] tensor.
  const int groups_of_heads = MAPS ? layout.head_groups : args.heads;
  const int outer = blockIdx.x / groups_of_heads;
  const int head_group = blockIdx.x % groups_of_heads;
  const int first_head = MAPS ? head_group * layout.heads_a_block : head_group;
  const int batch = outer / layout.splits;
  const int first_tile = outer % layout.splits * layout.tiles_a_block;
  const int steps = MAPS ? min(layout.heads_a_block, args.heads - first_head)
                         : min(layout.tiles_a_block, layout.tiles - first_tile);
  const int kv_batch = batch / args.kv_repeats;

  // Shared memory: K, V, every warp's rows of q, every warp's stage for its output.
  const uint32_t k_tile = shared_base();
  const uint32_t v_tile = layout.one_buffer ? k_tile : k_tile + kKeys * pitch;
  const uint32_t q_tiles = v_tile + kKeys * pitch;
  const uint32_t q_tile = q_tiles + warp * kRows * pitch;
  const uint32_t stage = q_tiles + warps * kRows * pitch + warp * kRows * kStagePitch;

  // The row and the half of its 16 columns this lane points ldmatrix to: q and V have their four matrices ordered down
  // first and then right, K right first and then down.
  const uint32_t down_lane = lane % 16 * pitch + lane / 16 * kPieceBytes;
  const uint32_t right_lane = (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * kPieceBytes;

  const int pieces = layout.padded_dim / kPieceElements;
  const Walk block_walk(threadIdx.x, blockDim.x, pieces);
  const Walk warp_walk(lane, kWarp, pieces);
  const auto head_at = [&](int step) { return first_head + (MAPS ? step : 0); };
  const auto row_at = [&](int step) { return ((first_tile + (MAPS ? 0 : step)) * warps + warp) * kRows; };
  const auto copy_q = [&](int step) {
    const void* from = matrix(args.q, args.q_strides, batch, head_at(step));
    copy_rows(q_tile, from, args.q_strides.row, row_at(step), kRows, args.queries, warp_walk, problem);
  };
  const auto copy_k = [&](int step) {
    const void* from = matrix(args.k, args.k_strides, kv_batch, head_at(step));
    copy_rows(k_tile, from, args.k_strides.row, 0, kKeys, args.keys, block_walk, problem);
  };
  const auto copy_v = [&](int step) {
    const void* from = matrix(args.v, args.v_strides, kv_batch, head_at(step));
    copy_rows(v_tile, from, args.v_strides.row, 0, kKeys, args.keys, block_walk, problem);
  };

  float mean[kTiles][2 * GROUPS][4];
  if constexpr (MAPS) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * GROUPS; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) mean[i][j][e] = 0.0f;
      }
    }
  }

  // Two groups of copies are under way at a time, in the order of their use: (q, K), V, the next (q, K), the next V.
  // With one buffer for K and V every group is waited for before the next one may start. K and V that stay for all
  // steps are shared by warps which then need no barrier: rows of q and stages are each warp's own.
  const bool reload = MAPS || layout.one_buffer;
  copy_q(0);
  copy_k(0);
  commit_copies();
  if (!layout.one_buffer) copy_v(0);
  commit_copies();

#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const bool more = step + 1 < steps;

    wait_for_older(layout.one_buffer);
    if (reload || step == 0) {
      __syncthreads();
    } else {
      __syncwarp();
    }
    float scores[kTiles][2 * GROUPS][4];
    multiply_keys<Element, GROUPS, kTiles>(scores, q_tile + down_lane, k_tile + right_lane, pitch, layout.padded_dim);

    // q and, where it is loaded again, K have been read by all.
    if (reload) {
      __syncthreads();
    } else {
      __syncwarp();
    }
    if (layout.one_buffer) copy_v(step);
    if (more) {
      copy_q(step + 1);
      if (reload && !layout.one_buffer) copy_k(step + 1);
    }
    commit_copies();

    const int first_row = row_at(step);
    uint32_t weights[kTiles][GROUPS][4];
    float inverse[kTiles][2];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      float sum[2];
      exponentiate<GROUPS>(scores[i], sum, args, lane);
      inverse[i][0] = reciprocal_fast(sum[0]);
      inverse[i][1] = reciprocal_fast(sum[1]);
      if constexpr (MAPS) {
#pragma unroll
        for (int j = 0; j < 2 * GROUPS; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) mean[i][j][e] += scores[i][j][e] * inverse[i][e / 2];
        }
      }
      // Two neighbouring 16x8 tiles of a product, packed, are one 16x16 left factor of the next.
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float(&tile)[4] = scores[i][2 * g + w / 2];
          weights[i][g][w] = pack(Element{}, tile[w % 2 * 2], tile[w % 2 * 2 + 1]);
        }
      }
    }

    wait_for_older(layout.one_buffer);
    if (reload || step == 0) __syncthreads();
    char* out = static_cast<char*>(args.out) +
                (batch * args.out_strides.batch + head_at(step) * args.out_strides.head +
                 first_row * args.out_strides.row) * 2;
    const int rows = args.queries - first_row;
    int column = 0;
#pragma unroll 1
    for (; column + 32 <= layout.padded_dim; column += 32) {
      output_columns<Element, 2>(weights, inverse, v_tile + down_lane, stage, out, column, rows, lane, problem);
    }
    if (column < layout.padded_dim) {
      output_columns<Element, 1>(weights, inverse, v_tile + down_lane, stage, out, column, rows, lane, problem);
    }

    if (reload) {
      __syncthreads();
      if (more && layout.one_buffer) copy_k(step + 1);
      if (more && !layout.one_buffer) copy_v(step + 1);
    }
    commit_copies();
  }

  if constexpr (MAPS) {
    const float share = 1.0f / static_cast<float>(args.heads);
    const int64_t first_line = (static_cast<int64_t>(head_group) * args.batch + batch) * args.queries;
#pragma unroll
    for (int j = 0; j < 2 * GROUPS; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int bit = 8 * j % 64 + 2 * (lane % 4) + e % 2;
        const uint64_t word = args.map_mask[j / 8];
        if ((word >> bit & 1) == 0) continue;
        const int slot = __popcll(word & ((uint64_t{1} << bit) - 1)) + (j / 8 == 0 ? 0 : __popcll(args.map_mask[0]));
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const int row = row_at(0) + 16 * i + e / 2 * 8 + lane / 4;
          if (row < args.queries) {
            store_global(problem.map_sums + (first_line + row) * args.map_count + slot, mean[i][j][e] * share);
          }
        }
      }
    }
  }
}

// maps = the sum of the head groups' parts, in the order of the heads.
struct Sums {
  const float* parts;  // [head_groups, count]
  float* maps;         // [count]
  int64_t count;
  int head_groups;
};

constexpr int kSumThreads = 256;

__global__ void __launch_bounds__(kSumThreads) sum_kernel(const Sums sums) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (place >= sums.count) return;
  float total = load_global(sums.parts + place);
  for (int group = 1; group < sums.head_groups; ++group) total += load_global(sums.parts + group * sums.count + place);
  store_global(sums.maps + place, total);
}

// ---- Host ----

bool wants_maps(const CrossAttentionArgs& args) { return args.maps != nullptr && args.map_count > 0; }

// The layout for a device with this many multiprocessors.
Layout plan(const CrossAttentionArgs& args, int multiprocessors) {
  Layout layout = {};
  for (int groups : kGroups) {
    layout.groups = groups;
    if (16 * groups >= args.keys) break;
  }
  layout.padded_dim = (args.head_dim + 15) / 16 * 16;
  layout.pitch = layout.padded_dim * 2 + kPieceBytes;
  const bool maps = wants_maps(args);
  const int rows = 16 * row_tiles(layout.groups, maps);
  const int64_t walks = static_cast<int64_t>(args.batch) * args.heads;

  // Large tiles read K and V less often; smaller ones when they would hold no queries or leave processors idle.
  int warps = kMaxWarps;
  while (warps > 1 && warps / 2 * rows >= args.queries) warps /= 2;
  if (warps == kMaxWarps && walks * divide_up(args.queries, warps * rows) < multiprocessors) warps /= 2;
  const auto fits = [&](int buffers, int warps) {
    const int tiles = buffers * 16 * layout.groups + warps * rows;
    layout.shared_bytes = tiles * layout.pitch + warps * rows * kStagePitch;
    layout.one_buffer = buffers == 1;
    layout.warps = warps;
    return layout.shared_bytes <= kMaxSharedBytes;
  };
  // Two warps and one buffer fit always: (128 + 32) * 528 + 32 * 80 bytes for 128 keys, less for fewer.
  if (!fits(2, warps) && !(warps > 2 && fits(2, 2)) && !fits(1, warps)) fits(1, 2);

  layout.tiles = divide_up(args.queries, layout.warps * rows);
  layout.tiles_a_block = 1;
  layout.heads_a_block = 1;
  layout.head_groups = args.heads;
  if (maps) {
    // A block and a half for a processor; beyond that, blocks that keep their sums for several heads. What groups of
    // heads write and read again is to q and out as 2 * head_groups * map_count is to heads * head_dim.
    const int64_t tiles = static_cast<int64_t>(args.batch) * layout.tiles;
    const int wanted = divide_up(static_cast<int64_t>(multiprocessors) * 3, 2 * tiles);
    layout.heads_a_block = divide_up(args.heads, wanted < args.heads ? wanted : args.heads);
    layout.head_groups = divide_up(args.heads, layout.heads_a_block);
  } else {
    // Enough blocks to fill the device a few times over; beyond that, blocks that load K and V once for several tiles.
    const int64_t plenty = static_cast<int64_t>(multiprocessors) * 8;
    while (layout.tiles_a_block < 8 && walks * divide_up(layout.tiles, 2 * layout.tiles_a_block) >= plenty) {
      layout.tiles_a_block *= 2;
    }
  }
  layout.splits = divide_up(layout.tiles, layout.tiles_a_block);
  return layout;
}

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
