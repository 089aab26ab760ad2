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
#pragma once

#include "cross_attention_layout.h"
#include "primitives.h"

#include <cmath>

namespace difffast::cuda {
namespace {

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
    // The scale is positive: the largest score has the largest logit.  Scores are subtracted before they are scaled: with
    // fmaf(score, scale, -largest) the one rounding of `largest` would overflow where logits are in the billions.
    largest = over_row(largest, [](float a, float b) { return fmaxf(a, b); });
    if (args.sink > 0) largest = fmaxf(largest, 0.0f);
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < 2 * GROUPS; ++j) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        scores[j][e] = exp2_fast((scores[j][e] - largest) * scale);
        total += scores[j][e];
      }
    }
    total = over_row(total, [](float a, float b) { return a + b; });
    if (args.sink > 0) total += static_cast<float>(args.sink) * exp2_fast(-largest * scale);
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

}  // namespace
}  // namespace difffast::cuda
