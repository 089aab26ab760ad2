// A number that is another one when any byte of some memory is.
#pragma once

#include <cstdint>

namespace difffast {

// Memory is read in parts of so many bytes, the last of them shorter.
constexpr int64_t kFingerprintPart = int64_t{1} << 16;

// Of `size` bytes, for the caller to add up over all parts, each of which has a number of its own.
uint64_t fingerprint(const void* data, int64_t size, uint64_t part);

}  // namespace difffast
