// Which of the compiled instruction sets runs on this machine.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>  // for simd.h, which is included inside namespaces
#endif

namespace difffast {

enum class InstructionSet { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kEmulatedAmx, kAmx };

// The best that this processor has; of pairs of bfloat16, if it multiplies them as fast as floats, which is measured.
// Of AMX there are products of bfloat16 in tiles; what does not use these is kAvx512's.
// DIFFFAST_INSTRUCTION_SET=baseline, avx2, avx512, avx512_bf16, emulated_amx or amx keeps to that one, or a smaller one
// that there is, so that tests reach all of them on one machine.
InstructionSet best_instruction_set();

// Its name: "amx", "emulated_amx", "avx512_bf16", "avx512", "avx2", or "baseline".
const char* instruction_set();

}  // namespace difffast
