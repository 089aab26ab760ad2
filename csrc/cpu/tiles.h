// Products of bfloat16 in AMX's tile registers; included by kernels after simd.h, inside a namespace, for a set that has
// DIFFFAST_TILES: no include guard.
//
// A register holds 16 rows of 64 bytes: 16 x 32 numbers of A, 16 x 16 pairs of B, or 16 x 16 sums of C.  One instruction
// adds up 16 x 16 x 32 products, sixteen times what AVX512_BF16 does in that time.
// With DIFFFAST_EMULATED_TILES the registers are memory, so that tests run the kernels on any processor; and for compilers
// that do not know AMX, whose kernels then are never called (may_use_amx in instruction_set.cpp).

constexpr int64_t kTileRows = 16, kTilePairs = 16;

inline int64_t whole_tiles(int64_t n) { return (n + kTileRows - 1) / kTileRows * kTileRows; }

#if defined(DIFFFAST_EMULATED_TILES) || !__has_include(<amxtileintrin.h>)
inline thread_local float emulated_tiles[8][kTileRows * kTilePairs];

struct TileRegisters {};

template <int n>
DIFFFAST_TARGET inline void clear_tile() {
  std::fill_n(emulated_tiles[n], kTileRows * kTilePairs, 0.0f);
}
template <int n>
DIFFFAST_TARGET inline void load_tile(const void* from, int64_t row_bytes) {
  for (int64_t i = 0; i < kTileRows; ++i) {
    std::memcpy(emulated_tiles[n] + i * kTilePairs, static_cast<const char*>(from) + i * row_bytes, 64);
  }
}
template <int n>
DIFFFAST_TARGET inline void store_tile(float* to, int64_t row_bytes) {
  for (int64_t i = 0; i < kTileRows; ++i) {
    std::memcpy(reinterpret_cast<char*>(to) + i * row_bytes, emulated_tiles[n] + i * kTilePairs, 64);
  }
}
template <int c, int a, int b>
DIFFFAST_TARGET inline void add_tile_products() {
  for (int64_t i = 0; i < kTileRows; ++i) {
    for (int64_t k = 0; k < kTilePairs; ++k) {
      Pair x, y;
      std::memcpy(&x, emulated_tiles[a] + i * kTilePairs + k, sizeof x);
      for (int64_t j = 0; j < kTilePairs; ++j) {
        std::memcpy(&y, emulated_tiles[b] + k * kTilePairs + j, sizeof y);
        float& sum = emulated_tiles[c][i * kTilePairs + j];
        sum += widen(x.first) * widen(y.first);
        sum += widen(x.second) * widen(y.second);
      }
    }
  }
}
#else
// Configures this thread's registers, all of them 16 rows of 64 bytes, while it lives.  Who else uses them, such as
// oneDNN, configures them before it does.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    // Not the intrinsic: GCC 12's reads eight bytes for all that the compiler knows, which then leaves out the others.
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// Instructions by hand as well: a compiler knows nothing of what the intrinsics read from memory, so that stores to it
// could come later.
template <int n>
DIFFFAST_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(n));
}
template <int n>
DIFFFAST_INLINE void load_tile(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(n) : "memory");
}
template <int n>
DIFFFAST_INLINE void store_tile(float* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(n) : "memory");
}
template <int c, int a, int b>
DIFFFAST_INLINE void add_tile_products() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}
#endif

// C[16 MR, 16 NC] = (accumulate ? C : 0) + A B, of at most four registers.
template <int MR, int NC>
DIFFFAST_INLINE void matmul_in_registers(int64_t depth, const Pair* a, int64_t a_row, const Pair* b, int64_t b_row,
                                         float* c, int64_t c_row, bool accumulate) {
  const int64_t a_bytes = a_row * int64_t{sizeof(Pair)}, b_bytes = b_row * int64_t{sizeof(Pair)};
  const int64_t c_bytes = c_row * int64_t{sizeof(float)};
  float* below = c + kTileRows * c_row;
  if (accumulate) {
    load_tile<0>(c, c_bytes);
    if constexpr (NC > 1) load_tile<1>(c + kTilePairs, c_bytes);
    if constexpr (MR > 1) load_tile<2>(below, c_bytes);
    if constexpr (MR > 1 && NC > 1) load_tile<3>(below + kTilePairs, c_bytes);
  } else {
    clear_tile<0>();
    if constexpr (NC > 1) clear_tile<1>();
    if constexpr (MR > 1) clear_tile<2>();
    if constexpr (MR > 1 && NC > 1) clear_tile<3>();
  }
  for (int64_t k = 0; k < depth; k += kTilePairs, a += kTilePairs, b += kTilePairs * b_row) {
    load_tile<4>(a, a_bytes);
    load_tile<6>(b, b_bytes);
    add_tile_products<0, 4, 6>();
    if constexpr (NC > 1) {
      load_tile<7>(b + kTilePairs, b_bytes);
      add_tile_products<1, 4, 7>();
    }
    if constexpr (MR > 1) {
      load_tile<5>(a + kTileRows * a_row, a_bytes);
      add_tile_products<2, 5, 6>();
    }
    if constexpr (MR > 1 && NC > 1) add_tile_products<3, 5, 7>();
  }
  store_tile<0>(c, c_bytes);
  if constexpr (NC > 1) store_tile<1>(c + kTilePairs, c_bytes);
  if constexpr (MR > 1) store_tile<2>(below, c_bytes);
  if constexpr (MR > 1 && NC > 1) store_tile<3>(below + kTilePairs, c_bytes);
}

// C[rows, 16 NC] = (accumulate ? C : 0) + A[rows, depth] B[depth, 16 NC], all of whole tiles; depth in pairs.
template <int NC>
DIFFFAST_INLINE void matmul_columns(int64_t rows, int64_t depth, const Pair* a, int64_t a_row, const Pair* b,
                                    int64_t b_row, float* c, int64_t c_row, bool accumulate) {
  for (; rows >= 2 * kTileRows; rows -= 2 * kTileRows, a += 2 * kTileRows * a_row, c += 2 * kTileRows * c_row) {
    matmul_in_registers<2, NC>(depth, a, a_row, b, b_row, c, c_row, accumulate);
  }
  if (rows > 0) matmul_in_registers<1, NC>(depth, a, a_row, b, b_row, c, c_row, accumulate);
}

DIFFFAST_TARGET inline void matmul_of_tiles(int64_t rows, int64_t columns, int64_t depth, const Pair* a, int64_t a_row,
                                            const Pair* b, int64_t b_row, float* c, int64_t c_row,
                                            bool accumulate = false) {
  for (; columns >= 2 * kTilePairs; columns -= 2 * kTilePairs, b += 2 * kTilePairs, c += 2 * kTilePairs) {
    matmul_columns<2>(rows, depth, a, a_row, b, b_row, c, c_row, accumulate);
  }
  if (columns > 0) matmul_columns<1>(rows, depth, a, a_row, b, b_row, c, c_row, accumulate);
}
