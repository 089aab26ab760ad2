// What attention's kernels do with their operands, for one instruction set; included by them after simd.h, inside a
// namespace: no include guard.

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class T>
constexpr int64_t round_up(int64_t n) {
  return (n + lanes<T> - 1) / lanes<T> * lanes<T>;
}

// to[rows][to_row] = factor * from[b, h, first + row, :], zero beyond head_dim up to to_row.
template <class S, class T>
DIFFFAST_TARGET void copy_rows(const View4& from, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t head_dim,
                               T factor, T* to, int64_t to_row) {
  const S* base = static_cast<const S*>(from.data) + b * from.stride[0] + h * from.stride[1] + first * from.stride[2];
  for (int64_t row = 0; row < rows; ++row, to += to_row) {
    const S* x = base + row * from.stride[2];
    if (from.stride[3] == 1) {
      for (int64_t c = 0; c < head_dim; ++c) to[c] = factor * widen(x[c]);
    } else {
      for (int64_t c = 0; c < head_dim; ++c) to[c] = factor * widen(x[c * from.stride[3]]);
    }
    for (int64_t c = head_dim; c < to_row; ++c) to[c] = 0;
  }
}

// to[head_dim][to_row] = from[b, h, :, :] transposed, zero beyond the keys up to to_row.
template <class S, class T>
DIFFFAST_TARGET void copy_columns(const View4& from, int64_t b, int64_t h, int64_t keys, int64_t head_dim, T* to,
                                  int64_t to_row) {
  const S* base = static_cast<const S*>(from.data) + b * from.stride[0] + h * from.stride[1];
  // A few columns at a time: their lines of `from` stay in the cache from one column to the next.
  for (int64_t first = 0; first < keys; first += 16) {
    const int64_t stop = std::min(first + 16, keys);
    for (int64_t c = 0; c < head_dim; ++c) {
      const S* x = base + c * from.stride[3];
      for (int64_t t = first; t < stop; ++t) to[c * to_row + t] = widen(x[t * from.stride[2]]);
    }
  }
  for (int64_t c = 0; c < head_dim; ++c) {
    for (int64_t t = keys; t < to_row; ++t) to[c * to_row + t] = 0;
  }
}
