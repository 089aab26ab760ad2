// repeat_batch on the CPU; raw pointers only, so that it compiles and can be tested without PyTorch.
#pragma once

#include <cstdint>

namespace difffast {

// Copy rows [begin, end) of the output: row b * repeats + j of `out` is row b of `in`; a row is `row_bytes` long.
void repeat_batch_rows(
    const char* in, char* out, int64_t row_bytes, int64_t repeats, int64_t begin, int64_t end);

}  // namespace difffast
