#include "fingerprint.h"

#include <algorithm>
#include <cstring>

namespace difffast {
namespace {

constexpr int64_t kPart = int64_t{1} << 16;
constexpr int kLanes = 8;

// Of splitmix64: every bit of the result depends on every bit of x.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace

int64_t fingerprint_parts(int64_t bytes) { return (bytes + kPart - 1) / kPart; }

// Several lanes side by side, so that the multiplications do not wait for each other; turned after each, so that no bit
// stays at the top, where it would be lost.
uint64_t fingerprint(const void* data, int64_t bytes, int64_t part) {
  const char* from = static_cast<const char*>(data) + part * kPart;
  const int64_t size = std::min(kPart, bytes - part * kPart), whole = size / 64 * 64;
  uint64_t lanes[kLanes] = {};
  const auto take = [&](const uint64_t* words) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t x = (lanes[i] ^ words[i]) * 0x9E3779B97F4A7C15u;
      lanes[i] = x << 31 | x >> 33;
    }
  };
  uint64_t words[kLanes];
  for (int64_t at = 0; at < whole; at += 64) {
    std::memcpy(words, from + at, 64);
    take(words);
  }
  std::memset(words, 0, 64);
  std::memcpy(words, from + whole, static_cast<size_t>(size - whole));
  take(words);
  uint64_t result = mix(static_cast<uint64_t>(part) + 1);
  for (int i = 0; i < kLanes; ++i) result = mix(result ^ lanes[i]) + static_cast<uint64_t>(size);
  return result;
}

}  // namespace difffast
