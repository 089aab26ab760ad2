// Entropy of attention maps for one instruction set; included by attention_entropy.cpp through every_set.h.
//
// A vector holds one word of several pixels: a pixel's words (12 of 77 columns, say) would fill vectors badly, and the
// softmax needs no sums across lanes.  Each block of pixels is transposed into a tile [words][kBlock] for that.

// Pixels of a block, a multiple of every set's lanes.
constexpr int64_t kBlock = 64;
// Pixels that are added up in vectors of the operand's type before their sum is added to a double.
constexpr int64_t kSumPixels = 256;
constexpr double kEntropyLog2E = 1.4426950408889634;

template <class T>
struct Block {
  int64_t b, first, rows, padded;  // padded: rows rounded up to whole vectors

  Block(const AttentionEntropy& p, int64_t item) {
    const int64_t blocks = (p.pixels + kBlock - 1) / kBlock;
    b = item / blocks;
    first = item % blocks * kBlock;
    rows = std::min(kBlock, p.pixels - first);
    padded = (rows + lanes<T> - 1) / lanes<T> * lanes<T>;
  }
};

// tile[words][kBlock] = exp((maps - largest word) / tau); sum[kBlock]: of the words.
template <class T>
DIFFFAST_TARGET void exponentials(const AttentionEntropy& p, const Block<T>& block, T* tile, T* sum) {
  const T* from = static_cast<const T*>(p.maps) + block.b * p.stride[0] + block.first * p.stride[1] + p.stride[2];
  for (int64_t row = 0; row < block.rows; ++row, from += p.stride[1]) {
    for (int64_t t = 0; t < p.tokens; ++t) tile[t * kBlock + row] = from[t * p.stride[2]];
  }
  for (int64_t row = block.rows; row < block.padded; ++row) {
    for (int64_t t = 0; t < p.tokens; ++t) tile[t * kBlock + row] = 0;
  }
  const T factor = static_cast<T>(kEntropyLog2E / p.tau);
  for (int64_t row = 0; row < block.padded; row += lanes<T>) {
    T* x = tile + row;
    Vec<T> top = load(x), total{}, lost{};
    for (int64_t t = 1; t < p.tokens; ++t) top = maximum<T>(top, load(x + t * kBlock));
    for (int64_t t = 0; t < p.tokens; ++t) {
      const Vec<T> e = exp2_of((load(x + t * kBlock) - top) * factor);
      store(x + t * kBlock, e);
      // A column's differences from its minimum amplify this sum's error: what an addition rounds away is added later.
      const Vec<T> next = total + e;
      lost += e - (next - total);
      total = next;
    }
    store(sum + row, total + lost);
  }
}

template <class T>
DIFFFAST_TARGET void columns(const AttentionEntropy& p, T* shares, int64_t begin, int64_t end) {
  std::vector<T> scratch((p.tokens + 2) * kBlock);
  T *tile = scratch.data(), *sum = tile + p.tokens * kBlock, *column = sum + kBlock;
  for (int64_t item = begin; item < end; ++item) {
    const Block<T> block(p, item);
    exponentials(p, block, tile, sum);
    for (int64_t k = 0; k < p.subjects; ++k) {
      const T* x = tile + (p.anchors[k] - 1) * kBlock;
      for (int64_t row = 0; row < block.padded; row += lanes<T>) store(column + row, load(x + row) / load(sum + row));
      std::copy(column, column + block.rows, shares + (block.b * p.subjects + k) * p.pixels + block.first);
    }
  }
}

// The first `count` lanes from memory, the others `rest`.
template <class T>
DIFFFAST_INLINE Vec<T> load_some(const T* p, int64_t count, T rest) {
  if (count >= lanes<T>) return load(p);
  T x[lanes<T>];
  for (int64_t i = 0; i < lanes<T>; ++i) x[i] = i < count ? p[i] : rest;
  return load(x);
}

template <class T>
DIFFFAST_INLINE void store_some(T* p, int64_t count, Vec<T> v) {
  if (count >= lanes<T>) return store(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

template <class T>
DIFFFAST_INLINE Vec<T> keep_some(int64_t count, Vec<T> v) {
  for (int64_t i = count; i < lanes<T>; ++i) v[i] = 0;
  return v;
}

template <class T>
DIFFFAST_TARGET void sums(const AttentionEntropy& p, T* shares, T* stats, int64_t* argmin, int64_t begin, int64_t end) {
  const T eps = static_cast<T>(p.eps);
  for (int64_t item = begin; item < end; ++item) {
    T* x = shares + item * p.pixels;
    T* to = stats + item * kEntropyStats;
    Vec<T> lowest = broadcast(std::numeric_limits<T>::infinity());
    for (int64_t i = 0; i < p.pixels; i += lanes<T>) {
      const Vec<T> b = load_some(x + i, p.pixels - i, std::numeric_limits<T>::infinity());
      lowest = b < lowest ? b : lowest;
    }
    T least = lowest[0];
    for (int i = 1; i < lanes<T>; ++i) least = std::min<T>(least, lowest[i]);

    double rise = 0;
    for (int64_t start = 0; start < p.pixels; start += kSumPixels) {
      const int64_t stop = std::min(start + kSumPixels, p.pixels);
      Vec<T> sum{};
      for (int64_t i = start; i < stop; i += lanes<T>) sum += load_some(x + i, stop - i, least) - least;
      rise += add_lanes<T>(sum);
    }
    const T total = static_cast<T>(rise);
    if (total == 0) {
      std::fill(x, x + p.pixels, T{0});
      std::fill(to, to + kEntropyStats, T{0});
      argmin[item] = -1;
      continue;
    }
    // The minimum is not found where a NaN is in every pixel; NaN is all that follows then, wherever it is put.
    const T* where = std::find(x, x + p.pixels, least);
    argmin[item] = p.detach_min || where == x + p.pixels ? -1 : where - x;

    // h = -g / weight.  sum(h) and N sum(h p) are nearly equal for a nearly uniform p: subtracted in every pixel.
    const T pixels = static_cast<T>(p.pixels);
    double entropy = 0, mean = 0, excess = 0;
    for (int64_t start = 0; start < p.pixels; start += kSumPixels) {
      const int64_t stop = std::min(start + kSumPixels, p.pixels);
      Vec<T> e{}, m{}, d{};
      for (int64_t i = start; i < stop; i += lanes<T>) {
        const Vec<T> share = (load_some(x + i, stop - i, least) - least) / total;
        const Vec<T> logarithm = log_of(share + eps);
        const Vec<T> h = logarithm + share / (share + eps);
        store_some(x + i, stop - i, share);
        e += share * logarithm;
        m += share * h;
        // Lanes past the end hold p = 0, for which only this is not zero.
        d += keep_some<T>(stop - i, h * (T{1} - pixels * share));
      }
      entropy += add_lanes<T>(e);
      mean += add_lanes<T>(m);
      excess += add_lanes<T>(d);
    }
    to[0] = total;
    to[1] = static_cast<T>(-p.weight * excess);
    to[2] = static_cast<T>(-p.weight * mean);
    to[3] = static_cast<T>(-p.weight * entropy);
  }
}

template <class T>
DIFFFAST_TARGET void backward(const AttentionEntropy& p, const AttentionEntropyGradient& g, int64_t begin,
                              int64_t end) {
  const T *grad = static_cast<const T*>(g.loss), *shares = static_cast<const T*>(g.shares);
  const T* stats = static_cast<const T*>(g.stats);
  T* out = static_cast<T*>(g.maps);
  const T eps = static_cast<T>(p.eps), weight = static_cast<T>(p.weight);
  std::vector<T> scratch((p.tokens + p.subjects + 1) * kBlock);
  T *tile = scratch.data(), *sum = tile + p.tokens * kBlock;
  T* slopes = sum + kBlock;  // [subjects][kBlock]: dL / db

  for (int64_t item = begin; item < end; ++item) {
    const Block<T> block(p, item);
    exponentials(p, block, tile, sum);
    for (int64_t k = 0; k < p.subjects; ++k) {
      const int64_t subject = block.b * p.subjects + k;
      const T *of = stats + subject * kEntropyStats, *x = shares + subject * p.pixels + block.first;
      T* slope = slopes + k * kBlock;
      if (of[0] == 0) {
        std::fill(slope, slope + block.padded, T{0});
        continue;
      }
      for (int64_t row = 0; row < block.padded; row += lanes<T>) {
        const Vec<T> share = load_some(x + row, block.rows - row, T{0});
        const Vec<T> h = log_of(share + eps) + share / (share + eps);
        store(slope + row, (-weight * h - of[2]) / of[0]);
      }
      const int64_t lowest = g.argmin[subject] - block.first;
      if (lowest >= 0 && lowest < block.rows) slope[lowest] -= of[1] / of[0];
    }

    const T factor = static_cast<T>(grad[block.b] / p.tau);
    for (int64_t row = 0; row < block.padded; row += lanes<T>) {
      T* x = tile + row;
      const Vec<T> total = load(sum + row);
      Vec<T> inner{};
      for (int64_t k = 0; k < p.subjects; ++k) {
        inner += load(x + (p.anchors[k] - 1) * kBlock) * load(slopes + k * kBlock + row);
      }
      inner /= total;
      const Vec<T> scale = factor / total;
      // Words lie between one anchor and the next; an anchor has its slope besides.
      int64_t t = 0;
      for (int64_t k = 0; k <= p.subjects; ++k) {
        const int64_t anchor = k < p.subjects ? p.anchors[k] - 1 : p.tokens;
        for (; t < anchor; ++t) store(x + t * kBlock, load(x + t * kBlock) * scale * -inner);
        if (k == p.subjects) break;
        store(x + t * kBlock, load(x + t * kBlock) * scale * (load(slopes + k * kBlock + row) - inner));
        ++t;
      }
    }

    T* to = out + (block.b * p.pixels + block.first) * p.columns;
    for (int64_t row = 0; row < block.rows; ++row, to += p.columns) {
      to[0] = 0;
      for (int64_t t = 0; t < p.tokens; ++t) to[1 + t] = tile[t * kBlock + row];
      std::fill(to + 1 + p.tokens, to + p.columns, T{0});
    }
  }
}
