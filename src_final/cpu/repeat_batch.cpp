#include "repeat_batch.h"

#include <cstring>

namespace difffast {

void repeat_batch_rows(
    const char* in, char* out, int64_t row_bytes, int64_t repeats, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    std::memcpy(out + row * row_bytes, in + (row / repeats) * row_bytes, static_cast<size_t>(row_bytes));
  }
}

}  // namespace difffast
