// What the launchers of csrc/cuda share, all of it on the host.
#pragma once

#include <cstdint>
#include <cstdio>

namespace difffast::cuda {

enum class ElementType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

inline int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Formatted text: the calling thread's own, until its next call.
template <typename... Values>
const char* message(const char* format, Values... values) {
  static thread_local char text[192];
  std::snprintf(text, sizeof text, format, values...);
  return text;
}

}  // namespace difffast::cuda
