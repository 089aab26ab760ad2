// A number that is another one when any byte of a tensor is.
#pragma once

#include <cstdint>

namespace difffast {

// Of part `part` of the bytes, for the caller to add up over [0, fingerprint_parts(bytes)).
int64_t fingerprint_parts(int64_t bytes);
uint64_t fingerprint(const void* data, int64_t bytes, int64_t part);

}  // namespace difffast
