#include "fingerprint.h"

#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace difffast {
namespace {

constexpr int kLanes = 8, kBlock = 8 * kLanes;
constexpr uint64_t kStep = 0x9E3779B97F4A7C15u;  // of the golden ratio

// Of splitmix64: every bit of the result depends on every bit of x.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

struct State {
  alignas(16) uint64_t keys[kLanes], sums[kLanes];
};

// A product of a word's two halves in each lane, as XXH3 has it.  Halves are hidden by keys that differ from place to
// place, so that words may not change places; where a half is hidden to nothing, the other one would be lost: so the
// neighbour's word is added.
#if defined(__SSE2__)
constexpr int64_t kAhead = 2048;  // bytes from which memory is asked for: processors stop at each page

// By hand: compilers do not find the instruction that multiplies 32 bits to 64.
void take(State& state, const char* from, int64_t blocks) {
  const __m128i step = _mm_set1_epi64x(static_cast<int64_t>(kStep));
  __m128i keys[kLanes / 2], sums[kLanes / 2];
  std::memcpy(keys, state.keys, sizeof(keys));
  std::memcpy(sums, state.sums, sizeof(sums));
  for (int64_t block = 0; block < blocks; ++block) {
    const uintptr_t ahead = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(kBlock * block + kAhead);
    _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
    for (int i = 0; i < kLanes / 2; ++i) {
      const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + kBlock * block + 16 * i));
      const __m128i hidden = _mm_xor_si128(words, keys[i]);
      const __m128i product = _mm_mul_epu32(hidden, _mm_srli_epi64(hidden, 32));
      const __m128i neighbours = _mm_shuffle_epi32(words, _MM_SHUFFLE(1, 0, 3, 2));
      sums[i] = _mm_add_epi64(sums[i], _mm_add_epi64(product, neighbours));
      keys[i] = _mm_add_epi64(keys[i], step);
    }
  }
  std::memcpy(state.keys, keys, sizeof(keys));
  std::memcpy(state.sums, sums, sizeof(sums));
}
#else
void take(State& state, const char* from, int64_t blocks) {
  uint64_t words[kLanes];
  for (int64_t block = 0; block < blocks; ++block) {
    std::memcpy(words, from + kBlock * block, kBlock);
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t hidden = words[i] ^ state.keys[i];
      state.sums[i] += (hidden & 0xFFFFFFFFu) * (hidden >> 32) + words[i ^ 1];
      state.keys[i] += kStep;
    }
  }
}
#endif

}  // namespace

uint64_t fingerprint(const void* data, int64_t size, uint64_t part) {
  const char* from = static_cast<const char*>(data);
  State state{};
  for (int i = 0; i < kLanes; ++i) state.keys[i] = mix((part + 1) * kStep + static_cast<uint64_t>(i));
  const int64_t blocks = size / kBlock;
  take(state, from, blocks);
  char rest[kBlock] = {};
  std::memcpy(rest, from + kBlock * blocks, static_cast<size_t>(size - kBlock * blocks));
  take(state, rest, 1);
  uint64_t result = mix(part + 1) + static_cast<uint64_t>(size);
  for (int i = 0; i < kLanes; ++i) result = mix(result ^ state.sums[i]);
  return result;
}

}  // namespace difffast
