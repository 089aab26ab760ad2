// Device instructions that CUDA C++ has no name for, for sm_80 on. On the host, tests/ops/cuda_emulator.h has the same
// functions, so that kernels written with them can be tested without a GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "cuda_emulator.h"  // tests/ops: the same functions on the host, one fiber per thread
#endif

namespace difffast::cuda {
namespace {

// Tags: elements are only ever moved, packed from and unpacked to float32, or handed to tensor cores.
template <int EXPONENT_BITS>
struct Format {};
using Float16 = Format<5>;
using BFloat16 = Format<8>;
struct Float32 {};

#ifdef __CUDACC__

// Shared memory is addressed by 32-bit byte offsets, as its instructions do.

__device__ __forceinline__ uint32_t shared_base() {
  extern __shared__ __align__(16) unsigned char storage[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(storage));
}

// Copies 16, 8 or 4 bytes from global to shared memory, or writes as many zeros, until this thread waits for its group.
template <int BYTES = 16>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool zero) {
  const int read = zero ? 0 : BYTES;
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(read) : "memory");
  } else {
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(read) : "memory");
  }
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's latest groups are unfinished.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of 2-byte elements; lane l gives the address of row l % 8 of matrix l / 8 and receives in word i
// elements 2 * (l % 4) and + 1 of row l / 4 of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// The same with every matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// c += a b with a: 16x16, b: 16x8, c: 16x8 in float32, spread over the warp as the PTX ISA says.
__device__ __forceinline__ void multiply_add(
    Float16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_add(
    BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two elements in a word, `low` in the lower half.
__device__ __forceinline__ uint32_t pack(Float16, float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ uint32_t pack(BFloat16, float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The two elements of a word.
__device__ __forceinline__ float2 unpack(Float16, uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

// bfloat16 is the upper half of float32.
__device__ __forceinline__ float2 unpack(BFloat16, uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

__device__ __forceinline__ void store_shared(uint32_t to, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t from) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(from)
               : "memory");
  return value;
}

__device__ __forceinline__ float load_shared_float(uint32_t from) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(from) : "memory");
  return value;
}

__device__ __forceinline__ void store_shared_float(uint32_t to, float value) {
  store_shared(to, __float_as_uint(value));
}

// ---- Clusters: blocks that run together and read each other's shared memory. From sm_90 on, if the launch asks. ----

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// What this thread wrote before is seen by all threads of the cluster that have waited for this arrival.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// The same without making anything seen, and so without a fence of the whole device: says that this block's threads
// have read what they wanted, if a barrier of the block lies between.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// Waits until all threads of the cluster have arrived as often as this one.
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// From the same place in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ float load_cluster_float(uint32_t from, uint32_t rank) {
  uint32_t place;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(place) : "r"(from), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(place) : "memory");
  return value;
}

#else

__device__ __forceinline__ void cluster_arrive() { __trap(); }
__device__ __forceinline__ void cluster_arrive_relaxed() { __trap(); }
__device__ __forceinline__ void cluster_wait() { __trap(); }
__device__ __forceinline__ float load_cluster_float(uint32_t, uint32_t) {
  __trap();
  return 0.0f;
}

#endif

template <typename T>
__device__ __forceinline__ T load_global(const T* from) {
  return *from;
}

template <typename T>
__device__ __forceinline__ void store_global(T* to, T value) {
  *to = value;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif  // __CUDACC__

}  // namespace
}  // namespace difffast::cuda
