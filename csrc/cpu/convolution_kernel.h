// Winograd's convolution for one instruction set; included by convolution.cpp after simd.h, inside a namespace.
//
// Points are 0, infinity, and +-1 (m = 2) or +-5/8 and +-3/2 (m = 4).  With these, rounding errors are 1.5 times those of
// adding up products one by one; with the usual +-1 and +-2 3.9 times.
//
// Scratch, with P = (m + 2)^2 points, the tiles of a turn, and channels in blocks of `lanes`:
//   V [P][blocks of input channels][tiles][lanes], the transformed input;
//   M [P][panels of output channels][tiles][kPanelVectors * lanes], the products.
// So the products read A at constant distances from one pointer, and B, which is laid out in panels, in order.

constexpr int kPanelVectors = 2;
constexpr int kTilesAtOnce = DIFFFAST_REGISTERS >= 32 ? 12 : 6;
template <class T>
constexpr int64_t panel_width = kPanelVectors * lanes<T>;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
struct WinogradSizes {
  int64_t points, rows, columns, blocks, panels;  // rows and columns of tiles in one image

  explicit WinogradSizes(const Winograd& p)
      : points((p.tile + 2) * (p.tile + 2)),
        rows(divide_up(p.height, p.tile)),
        columns(divide_up(p.width, p.tile)),
        blocks(divide_up(p.in_channels, lanes<T>)),
        panels(divide_up(p.out_channels, panel_width<T>)) {}

  int64_t input_size(int64_t turn) const { return points * blocks * turn * columns * lanes<T>; }
  int64_t product_size(int64_t turn) const { return points * panels * turn * columns * panel_width<T>; }
};

// One-dimensional transforms: of m + 2 values of the input, 3 of the weights, m + 2 products.  `step` is between values.
template <int m>
struct Transform;

template <>
struct Transform<2> {
  template <class V>
  static DIFFFAST_INLINE void input(const V* d, V* t, int step) {
    t[0] = d[2 * step] - d[0];
    t[step] = d[2 * step] + d[step];
    t[2 * step] = d[2 * step] - d[step];
    t[3 * step] = d[3 * step] - d[step];
  }
  template <class V>
  static DIFFFAST_INLINE void weights(const V* g, V* t, int from, int to) {
    const V even = (g[0] + g[2 * from]) / 2, odd = g[from] / 2;
    t[0] = -g[0];
    t[to] = even + odd;
    t[2 * to] = even - odd;
    t[3 * to] = g[2 * from];
  }
  template <class V>
  static DIFFFAST_INLINE void output(const V* p, V* y, int from, int to) {
    y[0] = p[0] + (p[from] + p[2 * from]);
    y[to] = (p[from] - p[2 * from]) + p[3 * from];
  }
};

template <>
struct Transform<4> {
  static constexpr double a = 0.625, b = 1.5;

  template <class V>
  static DIFFFAST_INLINE void input(const V* d, V* t, int step) {
    using T = std::decay_t<decltype(d[0][0])>;
    constexpr T aa = a * a, bb = b * b;
    const V d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
    t[0] = (d4 - d2 * T(aa + bb)) + d[0] * T(aa * bb);
    V even = d4 - d2 * bb, odd = (d3 - d1 * bb) * T(a);
    t[step] = even + odd;
    t[2 * step] = even - odd;
    even = d4 - d2 * aa, odd = (d3 - d1 * aa) * T(b);
    t[3 * step] = even + odd;
    t[4 * step] = even - odd;
    t[5 * step] = (d[5 * step] - d3 * T(aa + bb)) + d1 * T(aa * bb);
  }
  template <class V>
  static DIFFFAST_INLINE void weights(const V* g, V* t, int from, int to) {
    constexpr double aa = a * a, bb = b * b;
    t[0] = g[0] / (aa * bb);
    V even = (g[0] + g[2 * from] * aa) / (2 * aa * (aa - bb)), odd = g[from] * a / (2 * aa * (aa - bb));
    t[to] = even + odd;
    t[2 * to] = even - odd;
    even = (g[0] + g[2 * from] * bb) / (2 * bb * (bb - aa)), odd = g[from] * b / (2 * bb * (bb - aa));
    t[3 * to] = even + odd;
    t[4 * to] = even - odd;
    t[5 * to] = g[2 * from];
  }
  template <class V>
  static DIFFFAST_INLINE void output(const V* p, V* y, int from, int to) {
    using T = std::decay_t<decltype(p[0][0])>;
    const V even1 = p[from] + p[2 * from], odd1 = p[from] - p[2 * from];
    const V even2 = p[3 * from] + p[4 * from], odd2 = p[3 * from] - p[4 * from];
    y[0] = p[0] + (even1 + even2);
    y[to] = odd1 * T(a) + odd2 * T(b);
    y[2 * to] = even1 * T(a * a) + even2 * T(b * b);
    y[3 * to] = (odd1 * T(a * a * a) + odd2 * T(b * b * b)) + p[5 * from];
  }
};

// Pixels of an image, of which some channels are `step` apart, to vectors of these channels; put(i) is where that of pixel
// i goes.  Vectors are transposed, as long as there are enough pixels for it.
template <class S, class T, class Put>
DIFFFAST_TARGET void pixels_to_lanes(const S* from, int64_t step, int64_t channels, int64_t count, const Put& put) {
  int64_t first = 0;
  for (; channels == lanes<T> && first + lanes<T> <= count; first += lanes<T>) {
    Vec<T> rows[lanes<T>];
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i) rows[i] = load_wide(from + i * step + first);
    transpose<T>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i) store(put(first + i), rows[i]);
  }
  for (; first < count; ++first) {
    T* to = put(first);
    for (int64_t channel = 0; channel < channels; ++channel) to[channel] = widen(from[channel * step + first]);
  }
}

// The other way, from [count][lanes]; an addend that is not null lies as the pixels do, perhaps in their place.
template <class T, class S>
DIFFFAST_TARGET void lanes_to_pixels(const T* from, int64_t channels, int64_t count, const S* addend, S* to, int64_t step) {
  int64_t first = 0;
  for (; channels == lanes<T> && first + lanes<T> <= count; first += lanes<T>) {
    Vec<T> rows[lanes<T>];
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i) rows[i] = load(from + (first + i) * lanes<T>);
    transpose<T>(rows);
    if (addend != nullptr) {
#pragma GCC unroll 16
      for (int i = 0; i < lanes<T>; ++i) rows[i] += load_wide(addend + i * step + first);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i) store_narrow(rows[i], to + i * step + first);
  }
  for (int64_t channel = 0; channel < channels; ++channel) {
    for (int64_t i = first; i < count; ++i) {
      const T more = addend == nullptr ? T{0} : widen(addend[channel * step + i]);
      narrow(from[i * lanes<T> + channel] + more, to + channel * step + i);
    }
  }
}

// Weights of one input channel, [9][lanes] of output channels, to n * n vectors that are `step` apart.  In double: rounded
// once, they cost the result no accuracy.
template <class T, int m>
DIFFFAST_INLINE void weights_of_channel(const T* from, T* to, int64_t step) {
  typedef T Part __attribute__((vector_size(lanes<double> * sizeof(T))));
  constexpr int n = m + 2;
  for (int part = 0; part < lanes<T>; part += lanes<double>) {
    Vec<double> g[9], half[n * 3], t[n];
#pragma GCC unroll 9
    for (int i = 0; i < 9; ++i) {
      Part taps;
      std::memcpy(&taps, from + i * lanes<T> + part, sizeof taps);
      g[i] = __builtin_convertvector(taps, Vec<double>);
    }
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) Transform<m>::weights(g + j, half + j, 3, 3);
#pragma GCC unroll 6
    for (int i = 0; i < n; ++i) {
      Transform<m>::weights(half + i * 3, t, 1, 1);
#pragma GCC unroll 6
      for (int j = 0; j < n; ++j) {
        const Part rounded = __builtin_convertvector(t[j], Part);
        std::memcpy(to + (i * n + j) * step + part, &rounded, sizeof rounded);
      }
    }
  }
}

// to [panels][P][in_channels][panel_width]: of these panels those from `begin` to `end`.
template <class S, int m>
DIFFFAST_TARGET void weights_of_panels(int64_t in_channels, int64_t out_channels, const void* weight, void* to, int64_t begin,
                                       int64_t end) {
  using T = typename Compute<S>::type;
  constexpr int64_t points = (m + 2) * (m + 2), some = 16;  // input channels at once: they stay in the cache
  std::vector<T> buffer(some * 9 * lanes<T>);
  for (int64_t panel = begin; panel < end; ++panel) {
    T* panel_to = static_cast<T*>(to) + panel * points * in_channels * panel_width<T>;
    for (int64_t column = 0; column < panel_width<T>; column += lanes<T>) {
      const int64_t o = panel * panel_width<T> + column, channels = std::min<int64_t>(lanes<T>, out_channels - o);
      if (channels < lanes<T>) std::fill(buffer.begin(), buffer.end(), T{0});
      for (int64_t first = 0; first < in_channels; first += some) {
        const int64_t count = std::min(some, in_channels - first);
        if (channels > 0) {
          const S* from = static_cast<const S*>(weight) + (o * in_channels + first) * 9;
          const auto put = [&](int64_t i) { return buffer.data() + i * lanes<T>; };
          pixels_to_lanes<S, T>(from, in_channels * 9, channels, count * 9, put);
        }
        for (int64_t c = 0; c < count; ++c) {
          T* channel_to = panel_to + (first + c) * panel_width<T> + column;
          weights_of_channel<T, m>(buffer.data() + c * 9 * lanes<T>, channel_to, in_channels * panel_width<T>);
        }
      }
    }
  }
}

// Rows of what an image of half the height and width is when each of its pixels is repeated, to vectors of channels; rows
// are `step` apart.
template <class S, class T>
DIFFFAST_TARGET void doubled_rows(const Winograd& p, const S* from, int64_t channels, int64_t above, int64_t below, T* to,
                                  int64_t step) {
  const int64_t height = p.height / 2, width = p.width / 2;
  for (int64_t row = above; row < below; ++row, to += step) {
    if (row > above && row % 2 == 1) {
      std::memcpy(to, to - step, p.width * lanes<T> * sizeof(T));
      continue;
    }
    const auto put = [&](int64_t i) { return to + 2 * i * lanes<T>; };
    pixels_to_lanes<S, T>(from + row / 2 * width, height * width, channels, width, put);
    for (int64_t i = 0; i < width; ++i) store(to + (2 * i + 1) * lanes<T>, load(to + 2 * i * lanes<T>));
  }
}

// Item: one block of channels of one row of tiles.
template <class S, int m>
DIFFFAST_TARGET void input_stage(const Winograd& p, int64_t first, int64_t turn, typename Compute<S>::type* v, int64_t begin,
                                 int64_t end) {
  using T = typename Compute<S>::type;
  constexpr int n = m + 2;
  const WinogradSizes<T> sizes(p);
  const int64_t wide = sizes.columns * m + 2, tiles = turn * sizes.columns;
  std::vector<T> pixels(n * wide * lanes<T>);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / sizes.blocks, block = item % sizes.blocks;
    const int64_t image = (first + row) / sizes.rows, top = (first + row) % sizes.rows * m - 1;
    const int64_t channels = std::min<int64_t>(lanes<T>, p.in_channels - block * lanes<T>);
    std::fill(pixels.begin(), pixels.end(), T{0});
    const int64_t above = std::max<int64_t>(top, 0), below = std::min<int64_t>(top + n, p.height);
    T* to_first = pixels.data() + ((above - top) * wide + 1) * lanes<T>;
    const S* channel = static_cast<const S*>(p.x);
    if (p.doubled) {
      channel += (image * p.in_channels + block * lanes<T>) * (p.height / 2) * (p.width / 2);
      doubled_rows<S, T>(p, channel, channels, above, below, to_first, wide * lanes<T>);
    } else {
      // Rows of an image lie one behind the other.
      channel += ((image * p.in_channels + block * lanes<T>) * p.height + above) * p.width;
      const auto put = [&](int64_t i) { return to_first + (i / p.width * wide + i % p.width) * lanes<T>; };
      pixels_to_lanes<S, T>(channel, p.height * p.width, channels, (below - above) * p.width, put);
    }
    T* to = v + (block * tiles + row * sizes.columns) * lanes<T>;
    for (int64_t column = 0; column < sizes.columns; ++column, to += lanes<T>) {
      const T* at = pixels.data() + column * m * lanes<T>;
      Vec<T> half[n * n], t[n];
#pragma GCC unroll 6
      for (int j = 0; j < n; ++j) {
        Vec<T> d[n];
#pragma GCC unroll 6
        for (int i = 0; i < n; ++i) d[i] = load(at + (i * wide + j) * lanes<T>);
        Transform<m>::input(d, t, 1);
#pragma GCC unroll 6
        for (int i = 0; i < n; ++i) half[i * n + j] = t[i];
      }
#pragma GCC unroll 6
      for (int i = 0; i < n; ++i) {
        Transform<m>::input(half + i * n, t, 1);
#pragma GCC unroll 6
        for (int j = 0; j < n; ++j) store(to + (i * n + j) * sizes.blocks * tiles * lanes<T>, t[j]);
      }
    }
  }
}

// C [MR][panel_width] = A B, with A [blocks][tiles][lanes] and B [in_channels][panel_width].
template <class T, int MR>
DIFFFAST_INLINE void product_tile(int64_t channels, const T* a, int64_t block_step, const T* b, T* c) {
  Vec<T> sum[MR][kPanelVectors];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kPanelVectors; ++j) sum[i][j] = Vec<T>{};
  }
  for (int64_t start = 0; start < channels; start += lanes<T>, a += block_step) {
    const int64_t count = std::min<int64_t>(lanes<T>, channels - start);
    for (int64_t k = 0; k < count; ++k, b += panel_width<T>) {
      Vec<T> row[kPanelVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kPanelVectors; ++j) row[j] = load(b + j * lanes<T>);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const Vec<T> x = broadcast(a[i * lanes<T> + k]);
#pragma GCC unroll 4
        for (int j = 0; j < kPanelVectors; ++j) sum[i][j] += x * row[j];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kPanelVectors; ++j) store(c + i * panel_width<T> + j * lanes<T>, sum[i][j]);
  }
}

template <class T, int MR>
DIFFFAST_TARGET void product_rest(int64_t rows, int64_t channels, const T* a, int64_t block_step, const T* b, T* c) {
  if constexpr (MR > 0) {
    if (rows == MR) {
      product_tile<T, MR>(channels, a, block_step, b, c);
    } else {
      product_rest<T, MR - 1>(rows, channels, a, block_step, b, c);
    }
  }
}

// Item: one panel at one point; neighbours share the point, and with it A.
template <class S, int m>
DIFFFAST_TARGET void product_stage(const Winograd& p, int64_t turn, const typename Compute<S>::type* v,
                                   typename Compute<S>::type* products, int64_t begin, int64_t end) {
  using T = typename Compute<S>::type;
  const WinogradSizes<T> sizes(p);
  const int64_t tiles = turn * sizes.columns;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t point = item / sizes.panels, panel = item % sizes.panels;
    const T* a = v + point * sizes.blocks * tiles * lanes<T>;
    const int64_t before = (panel * sizes.points + point) * p.weight_channels + p.first_channel;
    const T* b = static_cast<const T*>(p.weights) + before * panel_width<T>;
    T* c = products + item * tiles * panel_width<T>;
    // Parts of nearly equal size: a short last one would leave most registers idle.
    for (int64_t left = tiles; left > 0;) {
      const int64_t rows = divide_up(left, divide_up(left, kTilesAtOnce));
      product_rest<T, kTilesAtOnce>(rows, p.in_channels, a, tiles * lanes<T>, b, c);
      a += rows * lanes<T>;
      c += rows * panel_width<T>;
      left -= rows;
    }
  }
}

// Item: one vector of output channels of one row of tiles.
template <class S, int m>
DIFFFAST_TARGET void output_stage(const Winograd& p, int64_t first, int64_t turn, const typename Compute<S>::type* products,
                                  int64_t begin, int64_t end) {
  using T = typename Compute<S>::type;
  constexpr int n = m + 2;
  const WinogradSizes<T> sizes(p);
  const int64_t wide = sizes.columns * m, tiles = turn * sizes.columns;
  const int64_t vectors = divide_up(p.out_channels, lanes<T>);
  std::vector<T> pixels(m * wide * lanes<T>);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / vectors, vector = item % vectors;
    const int64_t image = (first + row) / sizes.rows, top = (first + row) % sizes.rows * m;
    const int64_t channels = std::min<int64_t>(lanes<T>, p.out_channels - vector * lanes<T>);
    T offsets[lanes<T>] = {};
    if (p.bias != nullptr) {
      for (int64_t i = 0; i < channels; ++i) offsets[i] = widen(static_cast<const S*>(p.bias)[vector * lanes<T> + i]);
    }
    const Vec<T> offset = load(offsets);
    const T* from = products + (vector / kPanelVectors * tiles + row * sizes.columns) * panel_width<T> +
                    vector % kPanelVectors * lanes<T>;
    for (int64_t column = 0; column < sizes.columns; ++column, from += panel_width<T>) {
      Vec<T> half[m * n];
#pragma GCC unroll 6
      for (int j = 0; j < n; ++j) {
        Vec<T> d[n], t[m];
#pragma GCC unroll 6
        for (int i = 0; i < n; ++i) d[i] = load(from + (i * n + j) * sizes.panels * tiles * panel_width<T>);
        Transform<m>::output(d, t, 1, 1);
#pragma GCC unroll 6
        for (int i = 0; i < m; ++i) half[i * n + j] = t[i];
      }
      T* to = pixels.data() + column * m * lanes<T>;
#pragma GCC unroll 6
      for (int i = 0; i < m; ++i) {
        Vec<T> t[m];
        Transform<m>::output(half + i * n, t, 1, 1);
#pragma GCC unroll 6
        for (int j = 0; j < m; ++j) store(to + (i * wide + j) * lanes<T>, t[j] + offset);
      }
    }
    const int64_t place = ((image * p.out_channels + vector * lanes<T>) * p.height + top) * p.width;
    S* to = static_cast<S*>(p.out) + place;
    const S* addend = p.addend == nullptr ? nullptr : static_cast<const S*>(p.addend) + place;
    const int64_t height = std::min<int64_t>(m, p.height - top), step = p.height * p.width;
    // Rows of an image lie one behind the other, and so do these where none of their tiles is cut off.
    const int64_t parts = wide == p.width ? 1 : height, count = height / parts * p.width;
    for (int64_t i = 0; i < parts; ++i, to += count) {
      lanes_to_pixels<T, S>(pixels.data() + i * wide * lanes<T>, channels, count, addend, to, step);
      if (addend != nullptr) addend += count;
    }
  }
}

template <class T>
int64_t scratch_of(const Winograd& p, int64_t rows) {
  const WinogradSizes<T> sizes(p);
  return sizes.input_size(rows) + sizes.product_size(rows);
}

template <class T>
int64_t items_of(const Winograd& p, Stage stage, int64_t rows) {
  const WinogradSizes<T> sizes(p);
  switch (stage) {
    case Stage::kInput: return rows * sizes.blocks;
    case Stage::kProducts: return sizes.points * sizes.panels;
    case Stage::kOutput: return rows * divide_up(p.out_channels, lanes<T>);
  }
  return 0;
}

template <class S, int m>
DIFFFAST_TARGET void stage_of_tile(const Winograd& p, Stage stage, int64_t first, int64_t rows, void* scratch, int64_t begin,
                                   int64_t end) {
  using T = typename Compute<S>::type;
  T* v = static_cast<T*>(scratch);
  T* products = v + WinogradSizes<T>(p).input_size(rows);
  switch (stage) {
    case Stage::kInput: return input_stage<S, m>(p, first, rows, v, begin, end);
    case Stage::kProducts: return product_stage<S, m>(p, rows, v, products, begin, end);
    case Stage::kOutput: return output_stage<S, m>(p, first, rows, products, begin, end);
  }
}

template <class S>
void stage_of(const Winograd& p, Stage stage, int64_t first, int64_t rows, void* scratch, int64_t begin, int64_t end) {
  if (p.tile == 2) return stage_of_tile<S, 2>(p, stage, first, rows, scratch, begin, end);
  return stage_of_tile<S, 4>(p, stage, first, rows, scratch, begin, end);
}

template <class S>
void weights_of(int64_t tile, int64_t in_channels, int64_t out_channels, const void* weight, void* to, int64_t begin,
                int64_t end) {
  if (tile == 2) return weights_of_panels<S, 2>(in_channels, out_channels, weight, to, begin, end);
  return weights_of_panels<S, 4>(in_channels, out_channels, weight, to, begin, end);
}
