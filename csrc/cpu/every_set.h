// Compiles an operator's kernels once per instruction set.  Included by <stem>.cpp inside its anonymous namespace,
// after instruction_set.h and the headers that simd.h and the kernels need; no include guard.
// Before: DIFFFAST_KERNELS, the file in quotes, and DIFFFAST_WITH_BF16 if they multiply Pairs where a set can, in tiles
// where it has them.
// After: DIFFFAST_BY_SET(call) returns the call's value from the best set, and DIFFFAST_BY_BF16_SET(call) from the best
// for bfloat16: others have nothing of those, and each is compiled for what it is called for.

#define DIFFFAST_TARGET
#define DIFFFAST_VECTOR_BYTES 16
#define DIFFFAST_REGISTERS 16
namespace baseline {
#include "simd.h"
#include DIFFFAST_KERNELS
}  // namespace baseline

#if defined(__x86_64__)
#undef DIFFFAST_TARGET
#undef DIFFFAST_VECTOR_BYTES
#define DIFFFAST_TARGET __attribute__((target("avx2,fma")))
#define DIFFFAST_VECTOR_BYTES 32
namespace avx2 {
#include "simd.h"
#include DIFFFAST_KERNELS
}  // namespace avx2

#undef DIFFFAST_TARGET
#undef DIFFFAST_VECTOR_BYTES
#undef DIFFFAST_REGISTERS
#define DIFFFAST_TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")))
#define DIFFFAST_VECTOR_BYTES 64
#define DIFFFAST_REGISTERS 32
// GCC's own intrinsics start from a register that they leave as it is, and GCC 12 warns of it (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
namespace avx512 {
#include "simd.h"
#include DIFFFAST_KERNELS
}  // namespace avx512

#ifdef DIFFFAST_WITH_BF16
#undef DIFFFAST_TARGET
#define DIFFFAST_TARGET \
  __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512")))
#define DIFFFAST_BF16_PRODUCTS
namespace avx512_bf16 {
#include "simd.h"
#include DIFFFAST_KERNELS
}  // namespace avx512_bf16

#define DIFFFAST_TILES
namespace amx {
#include "simd.h"
#include DIFFFAST_KERNELS
}  // namespace amx

#define DIFFFAST_EMULATED_TILES
namespace emulated_amx {
#include "simd.h"
#include DIFFFAST_KERNELS
}  // namespace emulated_amx
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

// Those without products of bfloat16.
#define DIFFFAST_OTHER_SETS(call)                        \
  case InstructionSet::kAvx2: return avx2::call;         \
  case InstructionSet::kBaseline: return baseline::call; \
  default: return avx512::call;

#define DIFFFAST_BY_SET(call) \
  switch (best_instruction_set()) { DIFFFAST_OTHER_SETS(call) }
#define DIFFFAST_BY_BF16_SET(call)                                \
  switch (best_instruction_set()) {                               \
    case InstructionSet::kEmulatedAmx: return emulated_amx::call; \
    case InstructionSet::kAmx: return amx::call;                  \
    case InstructionSet::kAvx512Bf16: return avx512_bf16::call;   \
    DIFFFAST_OTHER_SETS(call)                                     \
  }
#else
#define DIFFFAST_BY_SET(call) return baseline::call;
#define DIFFFAST_BY_BF16_SET(call) return baseline::call;
#endif
