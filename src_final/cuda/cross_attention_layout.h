// Of cross attention's kernel: its sizes, and how its work is spread over a device.
#pragma once

#include "cross_attention.h"
#include "device.h"

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

// ---- Plan ----

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

}  // namespace
}  // namespace difffast::cuda
