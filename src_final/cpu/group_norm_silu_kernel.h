// GroupNorm and SiLU for one instruction set; included by group_norm_silu.cpp through every_set.h.
//
// In NCHW a group is a few runs of neighbouring numbers: one item takes its mean, then the squared differences from it,
// then the result, all but the first time from the cache.  In channels_last a group's rows are shorter than a vector:
// vectors hold channels, and each block of pixels leaves mean and M2, the sum of squared differences from it, of every
// channel.  These are joined to groups in double precision (Chan, Golub and LeVeque, 1979).

template <class S>
using ComputeOf = typename Compute<S>::type;

// u / (1 + exp(-u)).  The exponential is cut off where it is below 1e-37, and infinite from 3e38 on.
DIFFFAST_INLINE Vec<float> silu_of(Vec<float> u) {
  const Vec<float> lowest = broadcast(-125.0f), highest = broadcast(128.0f);
  Vec<float> x = u * -1.4426950408889634f;
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  return u / (exp2_within(x) + 1.0f);
}

DIFFFAST_INLINE Vec<double> silu_of(Vec<double> u) {
  for (int i = 0; i < lanes<double>; ++i) u[i] /= 1 + std::exp(-u[i]);
  return u;
}

template <class S>
DIFFFAST_INLINE const S* later(const S* addend, int64_t i) {
  return addend ? addend + i : nullptr;
}

template <class S>
DIFFFAST_INLINE Vec<ComputeOf<S>> load_sum(const S* x, const S* addend) {
  return addend ? load_wide(x) + load_wide(addend) : load_wide(x);
}

// Numbers that are added up in vectors of the operand's type before their sum is added to a double.
constexpr int64_t kSumRun = 1024;

// Sum over a run of x (+ addend): of the numbers, or of their squared differences from `center`.
template <class S, bool kSquares>
DIFFFAST_TARGET double run_sum(const S* x, const S* addend, int64_t count, ComputeOf<S> center) {
  using T = ComputeOf<S>;
  constexpr int kChains = 4;  // hide the latency of additions
  double total = 0;
  for (int64_t i = 0; i < count;) {
    const int64_t stop = std::min(i + kSumRun, count);
    Vec<T> sums[kChains] = {};
    for (; i + kChains * lanes<T> <= stop; i += kChains * lanes<T>) {
#pragma GCC unroll 4
      for (int j = 0; j < kChains; ++j) {
        const Vec<T> z = load_sum(x + i + j * lanes<T>, later(addend, i + j * lanes<T>)) - center;
        sums[j] += kSquares ? z * z : z;
      }
    }
    for (; i + lanes<T> <= stop; i += lanes<T>) {
      const Vec<T> z = load_sum(x + i, later(addend, i)) - center;
      sums[0] += kSquares ? z * z : z;
    }
    total += add_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < stop; ++i) {
      const T z = (addend ? widen(x[i]) + widen(addend[i]) : widen(x[i])) - center;
      total += kSquares ? z * z : z;
    }
  }
  return total;
}

// u = (x + addend - center) * gain + offset of one channel.
template <class T>
struct Affine {
  T center, gain, offset;
};

template <class S>
DIFFFAST_TARGET double channel_addend(const GroupNormSilu& p, int64_t b, int64_t c) {
  if (!p.addend_by_channel) return 0;
  return widen(static_cast<const S*>(p.addend)[b / p.addend_repeats * p.channels + c]);
}

template <class S>
DIFFFAST_TARGET Affine<ComputeOf<S>> channel_affine(const GroupNormSilu& p, int64_t b, int64_t c, double mean,
                                                    double rstd) {
  using T = ComputeOf<S>;
  double gain = rstd * widen(static_cast<const S*>(p.weight)[c]), offset = widen(static_cast<const S*>(p.bias)[c]);
  if (p.scale) {
    const double factor = 1.0 + widen(static_cast<const S*>(p.scale)[b * p.channels + c]);
    gain *= factor;
    offset = offset * factor + widen(static_cast<const S*>(p.shift)[b * p.channels + c]);
  }
  // What rounding takes from the center goes into the offset: it may be much of how far a group's numbers lie apart.
  const double exact = mean - channel_addend<S>(p, b, c);
  const T center = static_cast<T>(exact);
  return {center, static_cast<T>(gain), static_cast<T>(offset - (exact - center) * gain)};
}

// The next numbers of x (+ addend) under affine functions with these coefficients, one for all or one each.
template <class S, class A>
DIFFFAST_INLINE void apply_vector(const S* x, const S* addend, A center, A gain, A offset, bool silu, S* out) {
  const Vec<ComputeOf<S>> u = (load_sum(x, addend) - center) * gain + offset;
  store_narrow(silu ? silu_of(u) : u, out);
}

// The same for less than a vector.
template <class S, class A>
DIFFFAST_TARGET void apply_rest(const S* x, const S* addend, A center, A gain, A offset, bool silu, S* out,
                                int64_t count) {
  constexpr int kLanes = lanes<ComputeOf<S>>;
  S numbers[kLanes] = {}, addends[kLanes] = {};
  std::copy(x, x + count, numbers);
  if (addend) std::copy(addend, addend + count, addends);
  apply_vector(numbers, addend ? addends : nullptr, center, gain, offset, silu, numbers);
  std::copy(numbers, numbers + count, out);
}

template <class S>
DIFFFAST_TARGET void apply_run(const S* x, const S* addend, int64_t count, Affine<ComputeOf<S>> by, bool silu, S* out) {
  constexpr int kLanes = lanes<ComputeOf<S>>;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    apply_vector(x + i, later(addend, i), by.center, by.gain, by.offset, silu, out + i);
  }
  if (i < count) apply_rest(x + i, later(addend, i), by.center, by.gain, by.offset, silu, out + i, count - i);
}

template <class S>
DIFFFAST_TARGET void planes(const GroupNormSilu& p, int64_t begin, int64_t end) {
  using T = ComputeOf<S>;
  const S *x = static_cast<const S*>(p.x), *skip = static_cast<const S*>(p.skip);
  const S* addend = p.addend_by_channel ? nullptr : static_cast<const S*>(p.addend);
  const int64_t size = p.channels / p.groups, kept = p.kept / size, shared = p.groups - kept;
  const auto source = [&](int64_t b, int64_t c) {
    return c < p.own ? x + (b * p.own + c) * p.pixels
                     : skip + (b / p.repeats * (p.channels - p.own) + c - p.own) * p.pixels;
  };
  const auto added = [&](int64_t b, int64_t c) {
    return addend ? addend + (b / p.addend_repeats * p.channels + c) * p.pixels : nullptr;
  };
  for (int64_t item = begin; item < end; ++item) {
    const int64_t other = item - p.batch * kept;
    const int64_t b = other < 0 ? item / kept : other / shared * p.repeats;
    const int64_t first = (other < 0 ? item % kept : kept + other % shared) * size, last = first + size;
    // Channels that lie behind each other and have no addend of their own are one run.
    const auto run_end = [&](int64_t c) {
      if (p.addend_by_channel) return c + 1;
      return c < p.own ? std::min(p.own, last) : last;
    };
    const double count = static_cast<double>(size * p.pixels);
    double sum = 0, squares = 0;
    for (int64_t c = first, next; c < last; c = next) {
      next = run_end(c);
      const int64_t numbers = (next - c) * p.pixels;
      sum += run_sum<S, false>(source(b, c), added(b, c), numbers, 0) + numbers * channel_addend<S>(p, b, c);
    }
    const double mean = sum / count;
    for (int64_t c = first, next; c < last; c = next) {
      next = run_end(c);
      const double exact = mean - channel_addend<S>(p, b, c), numbers = static_cast<double>((next - c) * p.pixels);
      const T center = static_cast<T>(exact);
      squares += run_sum<S, true>(source(b, c), added(b, c), (next - c) * p.pixels, center) -
                 numbers * (exact - center) * (exact - center);
    }
    const double rstd = 1 / std::sqrt((squares < 0 ? 0 : squares) / count + p.eps);
    for (int64_t c = first; c < last; ++c) {
      S* to = c < p.kept ? static_cast<S*>(p.out) + (b * p.kept + c) * p.pixels
                         : static_cast<S*>(p.shared) +
                               (b / p.repeats * (p.channels - p.kept) + c - p.kept) * p.pixels;
      apply_run(source(b, c), added(b, c), p.pixels, channel_affine<S>(p, b, c, mean, rstd), p.silu, to);
    }
  }
}

// channels_last: pixels whose channels stay in the first cache between their two passes.
constexpr int64_t kRows = 32;

// Pixels of a block: some 128 Ki numbers.
inline int64_t block_rows(const GroupNormSilu& p) { return std::max<int64_t>(1, 131072 / p.channels / kRows) * kRows; }
inline int64_t row_blocks(const GroupNormSilu& p) { return (p.pixels + block_rows(p) - 1) / block_rows(p); }

// Where the parts of the scratch memory lie.
template <class T>
struct Scratch {
  // [blocks of all rows, channels]: of x, of the skip.
  T *mean, *m2, *skip_mean, *skip_m2;
  T *center, *gain, *offset;  // [batch, channels]
  int64_t count;

  Scratch(const GroupNormSilu& p, void* data) {
    const int64_t blocks = row_blocks(p), own = p.batch * blocks * p.own, all = p.batch * p.channels;
    const int64_t skip = p.batch / p.repeats * blocks * (p.channels - p.own);
    mean = static_cast<T*>(data);
    m2 = mean + own;
    skip_mean = m2 + own;
    skip_m2 = skip_mean + skip;
    center = skip_m2 + skip;
    gain = center + all;
    offset = gain + all;
    // The last channels are loaded as a whole vector.
    count = 2 * (own + skip) + 3 * all + 64 / static_cast<int64_t>(sizeof(T));
  }
};

// Mean and M2 of V vectors of channels over `rows` pixels.
template <class S, int V>
DIFFFAST_INLINE void column_moments(const S* x, const S* addend, int64_t rows, int64_t channels, ComputeOf<S>* mean,
                                    ComputeOf<S>* m2) {
  using T = ComputeOf<S>;
  Vec<T> means[V] = {}, squares[V] = {};
  for (int64_t start = 0; start < rows; start += kRows) {
    const int64_t stop = std::min(start + kRows, rows);
    Vec<T> sum[V] = {}, m[V] = {};
    for (int64_t row = start; row < stop; ++row) {
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        const int64_t at = row * channels + j * lanes<T>;
        sum[j] += load_sum(x + at, later(addend, at));
      }
    }
    const T numbers = static_cast<T>(stop - start);
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sum[j] /= numbers;
    for (int64_t row = start; row < stop; ++row) {
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        const int64_t at = row * channels + j * lanes<T>;
        const Vec<T> apart = load_sum(x + at, later(addend, at)) - sum[j];
        m[j] += apart * apart;
      }
    }
    const T share = numbers / static_cast<T>(stop);
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      const Vec<T> apart = sum[j] - means[j];
      means[j] += apart * share;
      squares[j] += m[j] + apart * apart * (share * static_cast<T>(start));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) {
    store(mean + j * lanes<T>, means[j]);
    store(m2 + j * lanes<T>, squares[j]);
  }
}

// The same for less than a vector of channels, by way of a copy.
template <class S>
DIFFFAST_TARGET void rest_moments(const S* x, const S* addend, int64_t rows, int64_t channels, int64_t rest,
                                  ComputeOf<S>* mean, ComputeOf<S>* m2) {
  using T = ComputeOf<S>;
  std::vector<T> z(rows * lanes<T>);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < rest; ++c) {
      const int64_t at = row * channels + c;
      z[row * lanes<T> + c] = addend ? widen(x[at]) + widen(addend[at]) : widen(x[at]);
    }
  }
  T moments[2][lanes<T>];
  column_moments<T, 1>(z.data(), nullptr, rows, lanes<T>, moments[0], moments[1]);
  std::copy(moments[0], moments[0] + rest, mean);
  std::copy(moments[1], moments[1] + rest, m2);
}

template <class S>
DIFFFAST_TARGET void moments(const GroupNormSilu& p, void* data, int64_t begin, int64_t end) {
  using T = ComputeOf<S>;
  const Scratch<T> scratch(p, data);
  const int64_t blocks = row_blocks(p), rows = block_rows(p);
  const S* addends = p.addend_by_channel ? nullptr : static_cast<const S*>(p.addend);
  for (int64_t item = begin; item < end; ++item) {
    const bool of_skip = item >= p.batch * blocks;
    const int64_t at = of_skip ? item - p.batch * blocks : item, b = at / blocks, first = at % blocks * rows;
    const int64_t channels = of_skip ? p.channels - p.own : p.own, some = std::min(rows, p.pixels - first);
    const S* x = static_cast<const S*>(of_skip ? p.skip : p.x) + (b * p.pixels + first) * channels;
    const S* addend = addends ? addends + (b / p.addend_repeats * p.pixels + first) * channels : nullptr;
    T* mean = (of_skip ? scratch.skip_mean : scratch.mean) + at * channels;
    T* m2 = (of_skip ? scratch.skip_m2 : scratch.m2) + at * channels;
    int64_t c = 0;
    for (; c + 4 * lanes<T> <= channels; c += 4 * lanes<T>) {
      column_moments<S, 4>(x + c, later(addend, c), some, channels, mean + c, m2 + c);
    }
    for (; c + lanes<T> <= channels; c += lanes<T>) {
      column_moments<S, 1>(x + c, later(addend, c), some, channels, mean + c, m2 + c);
    }
    if (c < channels) rest_moments(x + c, later(addend, c), some, channels, channels - c, mean + c, m2 + c);
  }
}

template <class S>
DIFFFAST_TARGET void coefficients(const GroupNormSilu& p, void* data, int64_t begin, int64_t end) {
  using T = ComputeOf<S>;
  const Scratch<T> scratch(p, data);
  const int64_t blocks = row_blocks(p), rows = block_rows(p), size = p.channels / p.groups;
  const double count = static_cast<double>(size * p.pixels);
  const int64_t of_skip = p.channels - p.own;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.groups, first = item % p.groups * size;
    // Where a channel's moments of its first block are; the next block's are `next` further.
    const int64_t own_at = b * blocks * p.own, skip_at = b / p.repeats * blocks * of_skip - p.own;
    double sum = 0, squares = 0;
    for (int64_t c = first; c < first + size; ++c) {
      const T* means = c < p.own ? scratch.mean + own_at + c : scratch.skip_mean + skip_at + c;
      const int64_t next = c < p.own ? p.own : of_skip;
      for (int64_t i = 0, left = p.pixels; left > 0; ++i, left -= rows) {
        sum += means[i * next] * static_cast<double>(std::min(rows, left));
      }
      sum += channel_addend<S>(p, b, c) * static_cast<double>(p.pixels);
    }
    const double mean = sum / count;
    for (int64_t c = first; c < first + size; ++c) {
      const T* means = c < p.own ? scratch.mean + own_at + c : scratch.skip_mean + skip_at + c;
      const T* m2 = c < p.own ? scratch.m2 + own_at + c : scratch.skip_m2 + skip_at + c;
      const int64_t next = c < p.own ? p.own : of_skip;
      const double center = mean - channel_addend<S>(p, b, c);
      for (int64_t i = 0, left = p.pixels; left > 0; ++i, left -= rows) {
        const double apart = means[i * next] - center;
        squares += m2[i * next] + apart * apart * static_cast<double>(std::min(rows, left));
      }
    }
    const double rstd = 1 / std::sqrt(squares / count + p.eps);
    for (int64_t c = first; c < first + size; ++c) {
      const Affine<T> by = channel_affine<S>(p, b, c, mean, rstd);
      scratch.center[b * p.channels + c] = by.center;
      scratch.gain[b * p.channels + c] = by.gain;
      scratch.offset[b * p.channels + c] = by.offset;
    }
  }
}

// Some channels of one pixel; `at` is their place in the coefficients.
template <class S>
DIFFFAST_INLINE void apply_pixel(const S* x, const S* addend, int64_t channels, const Scratch<ComputeOf<S>>& by,
                                 int64_t at, bool silu, S* out) {
  using T = ComputeOf<S>;
  const T *center = by.center + at, *gain = by.gain + at, *offset = by.offset + at;
  int64_t c = 0;
  for (; c + lanes<T> <= channels; c += lanes<T>) {
    apply_vector(x + c, later(addend, c), load(center + c), load(gain + c), load(offset + c), silu, out + c);
  }
  if (c < channels) {
    apply_rest(x + c, later(addend, c), load(center + c), load(gain + c), load(offset + c), silu, out + c,
               channels - c);
  }
}

template <class S>
DIFFFAST_TARGET void pixels(const GroupNormSilu& p, const void* data, int64_t begin, int64_t end) {
  const Scratch<ComputeOf<S>> by(p, const_cast<void*>(data));
  const int64_t blocks = row_blocks(p), rows = block_rows(p), of_skip = p.channels - p.own;
  const S *x = static_cast<const S*>(p.x), *skip = static_cast<const S*>(p.skip);
  const S* addend = p.addend_by_channel ? nullptr : static_cast<const S*>(p.addend);
  for (int64_t item = begin; item < end; ++item) {
    const bool is_shared = item >= p.batch * blocks;
    const int64_t at = is_shared ? item - p.batch * blocks : item, b = at / blocks, first = at % blocks * rows;
    for (int64_t i = first; i < std::min(first + rows, p.pixels); ++i) {
      if (is_shared) {
        S* to = static_cast<S*>(p.shared) + (b * p.pixels + i) * (p.channels - p.kept);
        apply_pixel<S>(skip + (b * p.pixels + i) * of_skip + p.kept - p.own, nullptr, p.channels - p.kept, by,
                       b * p.repeats * p.channels + p.kept, p.silu, to);
        continue;
      }
      const S* added = addend ? addend + (b / p.addend_repeats * p.pixels + i) * p.channels : nullptr;
      S* to = static_cast<S*>(p.out) + (b * p.pixels + i) * p.kept;
      apply_pixel(x + (b * p.pixels + i) * p.own, added, p.own, by, b * p.channels, p.silu, to);
      if (p.kept > p.own) {
        apply_pixel<S>(skip + (b / p.repeats * p.pixels + i) * of_skip, nullptr, p.kept - p.own, by,
                       b * p.channels + p.own, p.silu, to + p.own);
      }
    }
  }
}
