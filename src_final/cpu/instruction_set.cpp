#include "instruction_set.h"

#include <cstdlib>
#include <string>

namespace difffast {
namespace {

InstructionSet detect() {
#if defined(__x86_64__)
  const char* asked = std::getenv("DIFFFAST_INSTRUCTION_SET");
  const std::string most = asked ? asked : "avx512";
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && most == "avx512") return InstructionSet::kAvx512;
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
    case InstructionSet::kAvx512: return "avx512";
    case InstructionSet::kAvx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace difffast
