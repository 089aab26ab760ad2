// Which of the compiled instruction sets runs on this machine.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>  // for simd.h, which is included inside namespaces
#endif

namespace difffast {

enum class InstructionSet { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// The best that this processor has; of pairs of bfloat16, if it multiplies them as fast as floats, which is measured.
// DIFFFAST_INSTRUCTION_SET=baseline, avx2, avx512 or avx512_bf16 keeps to that one, or a smaller one that there is, so
// that tests reach all of them on one machine.
InstructionSet best_instruction_set();

// Its name: "avx512_bf16", "avx512", "avx2", or "baseline".
const char* instruction_set();

}  // namespace difffast
