#include "instruction_set.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace difffast {
namespace {

#if defined(__x86_64__)
constexpr int kSums = 12;  // independent ones, more than a multiplication takes cycles

__attribute__((target("avx512f"))) void add_float_products(int64_t times) {
  __m512 x = _mm512_set1_ps(0.5f), sums[kSums] = {};
  asm volatile("" : "+v"(x));  // not a constant
  while (times-- > 0) {
#pragma GCC unroll 12
    for (__m512& sum : sums) sum = _mm512_fmadd_ps(x, x, sum);
  }
  for (__m512& sum : sums) asm volatile("" ::"v"(sum));
}

__attribute__((target("avx512f,avx512bf16"))) void add_pair_products(int64_t times) {
  __m512i x = _mm512_set1_epi32(0x3F003F00);
  __m512 sums[kSums] = {};
  asm volatile("" : "+v"(x));
  while (times-- > 0) {
#pragma GCC unroll 12
    for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)x);
  }
  for (__m512& sum : sums) asm volatile("" ::"v"(sum));
}

double shortest_seconds(void (*run)(int64_t)) {
  using Clock = std::chrono::steady_clock;
  double shortest = 1;
  for (int i = 0; i < 20; ++i) {
    const Clock::time_point start = Clock::now();
    run(300);
    shortest = std::min(shortest, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return shortest;
}

// Whether the instruction for pairs is as fast as that for floats (AMD's Zen 4), not half as fast, as it may be: then
// nothing is gained for probabilities that are rounded.
bool multiplies_pairs_fast() { return shortest_seconds(add_pair_products) < 1.5 * shortest_seconds(add_float_products); }

// Whether there is AMX for bfloat16 and a compiler that knows it, and the system lets this process have its registers, for
// which one asks.
bool may_use_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl) && __has_include(<amxtileintrin.h>)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr int kAskPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

InstructionSet detect() {
#if defined(__x86_64__)
  const char* asked = std::getenv("DIFFFAST_INSTRUCTION_SET");
  const std::string most = asked && *asked ? asked : "amx";  // the largest
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  if (has_bf16 && most == "amx" && may_use_amx()) return InstructionSet::kAmx;
  if (has_bf16 && most == "emulated_amx") return InstructionSet::kEmulatedAmx;
  if (has_bf16 && (most == "avx512_bf16" || (most == "amx" && multiplies_pairs_fast()))) return InstructionSet::kAvx512Bf16;
  if (has_avx512 && most != "avx2" && most != "baseline") return InstructionSet::kAvx512;
  if (has_avx2 && most != "baseline") return InstructionSet::kAvx2;
#endif
  return InstructionSet::kBaseline;
}

}  // namespace

InstructionSet best_instruction_set() {
  static const InstructionSet set = detect();
  return set;
}

const char* instruction_set() {
  switch (best_instruction_set()) {
    case InstructionSet::kAmx: return "amx";
    case InstructionSet::kEmulatedAmx: return "emulated_amx";
    case InstructionSet::kAvx512Bf16: return "avx512_bf16";
    case InstructionSet::kAvx512: return "avx512";
    case InstructionSet::kAvx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace difffast
