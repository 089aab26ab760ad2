// Attention over any number of keys for one instruction set; included by joint_attention.cpp after simd.h, inside a
// namespace.
//
// Keys come in tiles, and the softmax is kept up with a running maximum and sum (online softmax, arXiv 1805.02867; tiles
// as in FlashAttention, arXiv 2205.14135, section 3.1).  Everything is transposed: a vector holds one number of several
// query rows.  So maximum and sum over the keys need no reduction within a vector, and narrow heads fill whole vectors.

#include "operands.h"

// Query rows of a block, at most, and keys of a tile.
constexpr int64_t kRows = 64, kTile = 64;
// Logits of base 2 may be larger than the running maximum by so much before all that is summed up is scaled anew, which
// would otherwise happen at nearly every tile.  Exponentials are then at most 2^8 (as in FlashAttention-4).
constexpr int kGrowth = 8;

// Keys and values of one head as what is computed in: element c of key t is at t * row + c * column.
template <class T>
struct Part {
  const T *k, *v;
  int64_t keys, k_row, k_column, v_row, v_column;
};

// The keys and values of one head, of the text and of the pixels, as a thread reads them.
template <class S>
class Head {
 public:
  using T = typename Compute<S>::type;

  // lay_out: what is in the type of the sums already is copied as well, row after row.  As it comes, the rows of a head
  // are as far apart as those of a picture's pixels: in many pages, and in few of the first cache's sets.
  Head(const JointAttention& p, bool lay_out) : p_(p), copies_(!std::is_same_v<S, T> || lay_out) {
    if (copies_) memory_.resize(2 * (p.text_keys + p.keys) * p.head_dim);
  }

  DIFFFAST_TARGET void go_to(int64_t b, int64_t h) {
    if (b == b_ && h == h_) return;
    b_ = b;
    h_ = h;
    T* to = memory_.data();
    for (const bool text : {true, false}) {
      const View4 &k = text ? p_.text_k : p_.k, &v = text ? p_.text_v : p_.v;
      const int64_t keys = text ? p_.text_keys : p_.keys, row = text ? b / p_.repeats : b, dim = p_.head_dim;
      Part<T>& part = text ? text_ : pixels_;
      if (keys == 0) {
        part = {};
      } else if (copies_) {
        copy_rows<S, T>(k, row, h, 0, keys, dim, T{1}, to, dim);
        copy_rows<S, T>(v, row, h, 0, keys, dim, T{1}, to + keys * dim, dim);
        part = {to, to + keys * dim, keys, dim, 1, dim, 1};
        to += 2 * keys * dim;
      } else if constexpr (std::is_same_v<S, T>) {
        part = {static_cast<const T*>(k.data) + row * k.stride[0] + h * k.stride[1],
                static_cast<const T*>(v.data) + row * v.stride[0] + h * v.stride[1],
                keys, k.stride[2], k.stride[3], v.stride[2], v.stride[3]};
      }
    }
  }

  const Part<T>& text() const { return text_; }
  const Part<T>& pixels() const { return pixels_; }

 private:
  const JointAttention& p_;
  const bool copies_;
  std::vector<T> memory_;
  int64_t b_ = -1, h_ = -1;
  Part<T> text_{}, pixels_{};
};

// Whether laying a head out costs little beside what it spares: it is read by several blocks of query rows.
inline bool pays_to_lay_out(const JointAttention& p, int64_t blocks) {
  const auto is_plain = [&](const View4& x) { return x.stride[2] == p.head_dim && x.stride[3] == 1; };
  return blocks >= 4 && !(is_plain(p.k) && is_plain(p.v));
}

// What a block of query rows knows so far.
template <class T>
struct Block {
  int64_t width;  // rows, rounded up to whole vectors
  T *q, *s, *o, *top, *sum;  // [head_dim][width], [kTile][width], [head_dim][width], [width], [width]
};

// Adds a tile of keys.
template <class T>
DIFFFAST_TARGET void add_tile(const Block<T>& block, const Part<T>& part, int64_t first, int64_t keys, int64_t head_dim) {
  const int64_t width = block.width;
  matmul(keys, width, head_dim, part.k + first * part.k_row, part.k_row, part.k_column, block.q, width, block.s, width);
  for (int64_t i = 0; i < width; i += lanes<T>) {
    const Vec<T> before = load(block.top + i);
    Vec<T> top = before;
    for (int64_t t = 0; t < keys; ++t) top = maximum<T>(top, load(block.s + t * width + i));
    const bool grown = exceeds_anywhere<T>(top - before, kGrowth);
    if (!grown) top = before;
    Vec<T> sum{};
    for (int64_t t = 0; t < keys; ++t) {
      T* at = block.s + t * width + i;
      const Vec<T> e = exp2_of(load(at) - top);
      store(at, e);
      sum += e;
    }
    if (grown) {
      const Vec<T> shrink = exp2_of(before - top);
      store(block.top + i, top);
      sum += load(block.sum + i) * shrink;
      for (int64_t c = 0; c < head_dim; ++c) {
        T* at = block.o + c * width + i;
        store(at, load(at) * shrink);
      }
    } else {
      sum += load(block.sum + i);
    }
    store(block.sum + i, sum);
  }
  matmul(head_dim, width, keys, part.v + first * part.v_row, part.v_column, part.v_row, block.s, width, block.o, width,
         true);
}

// mean[map_count][width] += probabilities of the chosen keys.
template <class T>
DIFFFAST_TARGET void add_maps(const JointAttention& p, const Block<T>& block, const Part<T>& text, T* mean) {
  for (int64_t m = 0; m < p.map_count; ++m) {
    matmul(int64_t{1}, block.width, p.head_dim, text.k + p.map_tokens[m] * text.k_row, text.k_row, text.k_column,
           block.q, block.width, block.s, block.width);
    for (int64_t i = 0; i < block.width; i += lanes<T>) {
      const Vec<T> e = exp2_of(load(block.s + i) - load(block.top + i));
      T* at = mean + m * block.width + i;
      store(at, load(at) + e / load(block.sum + i));
    }
  }
}

template <class S>
DIFFFAST_TARGET void forward(const JointAttention& p, void* out_data, void* maps_data, int64_t begin, int64_t end) {
  using T = typename Compute<S>::type;
  S* out = static_cast<S*>(out_data);
  T* maps = static_cast<T*>(maps_data);
  const int64_t dim = p.head_dim;
  std::vector<T> scratch(kRows * (2 * dim + kTile + 2 + p.map_count));
  Block<T> block;
  block.q = scratch.data();
  block.o = block.q + kRows * dim;
  block.s = block.o + kRows * dim;
  block.top = block.s + kRows * kTile;
  block.sum = block.top + kRows;
  T* mean = block.sum + kRows;
  const T factor = static_cast<T>(p.scale * kLog2E);
  const int64_t blocks = (p.queries + kRows - 1) / kRows, groups = maps ? 1 : p.heads, share = p.heads / groups;
  Head<S> head(p, !maps && pays_to_lay_out(p, blocks));  // with maps, each block goes through all heads

  for (int64_t item = begin; item < end; ++item) {
    const int64_t index = item % blocks, group = item / blocks % groups, b = item / blocks / groups;
    // Blocks of nearly equal size.
    const int64_t first = p.queries * index / blocks, rows = p.queries * (index + 1) / blocks - first;
    block.width = round_up<T>(rows);
    if (maps) std::fill(mean, mean + p.map_count * block.width, T{0});
    for (int64_t h = group * share; h < (group + 1) * share; ++h) {
      const S* q = static_cast<const S*>(p.q.data) + b * p.q.stride[0] + h * p.q.stride[1] + first * p.q.stride[2];
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t c = 0; c < dim; ++c) {
          block.q[c * block.width + row] = factor * widen(q[row * p.q.stride[2] + c * p.q.stride[3]]);
        }
      }
      for (int64_t row = rows; row < block.width; ++row) {
        for (int64_t c = 0; c < dim; ++c) block.q[c * block.width + row] = 0;
      }
      std::fill(block.o, block.o + dim * block.width, T{0});
      std::fill(block.sum, block.sum + block.width, T{0});
      std::fill(block.top, block.top + block.width, std::numeric_limits<T>::lowest());
      head.go_to(b, h);
      for (const Part<T>& part : {head.text(), head.pixels()}) {
        for (int64_t t = 0; t < part.keys; t += kTile) add_tile(block, part, t, std::min(kTile, part.keys - t), dim);
      }
      if (maps) add_maps(p, block, head.text(), mean);
      for (int64_t row = 0; row < rows; ++row) {
        S* to = out + ((b * p.queries + first + row) * p.heads + h) * dim;
        const T inverse = T{1} / block.sum[row];
        for (int64_t c = 0; c < dim; ++c) narrow(inverse * block.o[c * block.width + row], to + c);
      }
    }
    if (maps) {
      T* to = maps + (b * p.queries + first) * p.map_count;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t m = 0; m < p.map_count; ++m) *to++ = mean[m * block.width + row] / static_cast<T>(p.heads);
      }
    }
  }
}
