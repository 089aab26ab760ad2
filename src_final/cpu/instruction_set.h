// Which of the compiled instruction sets runs on this machine.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>  // for simd.h, which is included inside namespaces
#endif

namespace difffast {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// The best that this processor has.  DIFFFAST_INSTRUCTION_SET=baseline or avx2 keeps to a smaller one, so that tests
// reach all of them on one machine.
InstructionSet best_instruction_set();

// Its name: "avx512", "avx2", or "baseline".
const char* instruction_set();

}  // namespace difffast
