// Attention over any number of keys for one instruction set; included by joint_attention.cpp after simd.h, inside a
// namespace.
//
// Keys come in tiles, and the softmax is kept up with a running maximum and sum (online softmax, arXiv 1805.02867; tiles
// as in FlashAttention, arXiv 2205.14135, section 3.1).  Everything is transposed: a vector holds one number of several
// query rows.  So maximum and sum over the keys need no reduction within a vector, and narrow heads fill whole vectors.
//
// Where a set multiplies pairs of bfloat16, these are the operands, and probabilities are rounded to bfloat16, as in
// PyTorch's kernels: one instruction for two products, and no copies in float32.

#include "operands.h"

// Query rows of a block, at most, and keys of a tile.
constexpr int64_t kRows = 64, kTile = 64;
// Logits of base 2 may be larger than the running maximum by so much before all that is summed up is scaled anew, which
// would otherwise happen at nearly every tile.  Exponentials are then at most 2^8 (as in FlashAttention-4).
constexpr int kGrowth = 8;

// Operands of both products: what sums are in, or pairs.
#ifdef DIFFFAST_BF16_PRODUCTS
template <class S>
using Operand = std::conditional_t<std::is_same_v<S, BFloat16>, Pair, typename Compute<S>::type>;
#else
template <class S>
using Operand = typename Compute<S>::type;
#endif
template <class E>
constexpr int64_t kPacked = std::is_same_v<E, Pair> ? 2 : 1;
template <class E>
constexpr int64_t packed(int64_t n) {
  return (n + kPacked<E> - 1) / kPacked<E>;
}

// Keys and values of one head as operands: of key t, operand c along the head is at k + t * k_row + c * k_column; of
// element c, operand t along the keys at v + t * v_row + c * v_column.
template <class E>
struct Part {
  const E *k, *v;
  int64_t keys, k_row, k_column, v_row, v_column;
};

// to[i][j] = elements 2 j and 2 j + 1 of row i of `from`, zero beyond `size`.
DIFFFAST_TARGET inline void pair_up(const BFloat16* from, int64_t rows, int64_t row, int64_t size, int64_t step, Pair* to,
                                    int64_t to_row, int64_t to_step) {
  const auto pair = [&](int64_t i, int64_t j) {
    const BFloat16* x = from + i * row + 2 * j * step;
    to[i * to_row + j * to_step] = {x[0], 2 * j + 1 < size ? x[step] : BFloat16{0}};
  };
  const int64_t whole = size / 2;
  if (step == 1 && to_step == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(to + i * to_row, from + i * row, static_cast<size_t>(whole) * sizeof(Pair));
    }
  } else if (row == 1 && to_row == 1) {
    for (int64_t j = 0; j < whole; ++j) {
      const BFloat16 *first = from + 2 * j * step, *second = first + step;
      for (int64_t i = 0; i < rows; ++i) to[i + j * to_step] = {first[i], second[i]};
    }
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < whole; ++j) pair(i, j);
    }
  }
  if (size % 2) {
    for (int64_t i = 0; i < rows; ++i) pair(i, whole);
  }
}

// The keys and values of one head, of the text and of the pixels, as a thread reads them.
template <class S>
class Head {
 public:
  using E = Operand<S>;

  // lay_out: what are operands already is copied as well, row after row.  As it comes, the rows of a head are as far
  // apart as those of a picture's pixels: in many pages, and in few of the first cache's sets.
  Head(const JointAttention& p, bool lay_out) : p_(p), copies_(!std::is_same_v<S, E> || lay_out) {
    if (copies_) memory_.resize(count_operands(p.text_keys, p.head_dim) + count_operands(p.keys, p.head_dim));
  }

  DIFFFAST_TARGET void go_to(int64_t b, int64_t h) {
    if (b == b_ && h == h_) return;
    b_ = b;
    h_ = h;
    E* to = memory_.data();
    for (const bool text : {true, false}) {
      const View4 &k = text ? p_.text_k : p_.k, &v = text ? p_.text_v : p_.v;
      const int64_t keys = text ? p_.text_keys : p_.keys, row = text ? b / p_.repeats : b;
      Part<E>& part = text ? text_ : pixels_;
      if (keys == 0) {
        part = {};
      } else if (copies_) {
        part = copy(k, v, row, h, keys, to);
        to += count_operands(keys, p_.head_dim);
      } else if constexpr (std::is_same_v<S, E>) {
        part = {static_cast<const E*>(k.data) + row * k.stride[0] + h * k.stride[1],
                static_cast<const E*>(v.data) + row * v.stride[0] + h * v.stride[1],
                keys, k.stride[2], k.stride[3], v.stride[2], v.stride[3]};
      }
    }
  }

  const Part<E>& text() const { return text_; }
  const Part<E>& pixels() const { return pixels_; }

 private:
  static int64_t count_operands(int64_t keys, int64_t dim) { return keys * packed<E>(dim) + packed<E>(keys) * dim; }

  // Keys and values row after row; of pairs, two rows of values in one.
  DIFFFAST_TARGET Part<E> copy(const View4& k, const View4& v, int64_t b, int64_t h, int64_t keys, E* to) const {
    const int64_t dim = p_.head_dim, k_row = packed<E>(dim);
    E* values = to + keys * k_row;
    if constexpr (std::is_same_v<E, Pair>) {
      const auto start = [&](const View4& x) {
        return static_cast<const BFloat16*>(x.data) + b * x.stride[0] + h * x.stride[1];
      };
      pair_up(start(k), keys, k.stride[2], dim, k.stride[3], to, k_row, 1);
      pair_up(start(v), dim, v.stride[3], keys, v.stride[2], values, 1, dim);
    } else {
      copy_rows<S, E>(k, b, h, 0, keys, dim, E{1}, to, dim);
      copy_rows<S, E>(v, b, h, 0, keys, dim, E{1}, values, dim);
    }
    return {to, values, keys, k_row, 1, dim, 1};
  }

  const JointAttention& p_;
  const bool copies_;
  std::vector<E> memory_;
  int64_t b_ = -1, h_ = -1;
  Part<E> text_{}, pixels_{};
};

// Whether laying a head out costs little beside what it spares: it is read by several blocks of query rows.
inline bool pays_to_lay_out(const JointAttention& p, int64_t blocks) {
  const auto is_plain = [&](const View4& x) { return x.stride[2] == p.head_dim && x.stride[3] == 1; };
  return blocks >= 4 && !(is_plain(p.k) && is_plain(p.v));
}

// What a block of query rows knows so far.
template <class E>
struct Block {
  using T = Sum<E>;
  int64_t width;  // rows, rounded up to whole vectors
  E *q, *p;  // [packed head_dim][width], [packed kTile][width]: probabilities; s where operands are what sums are in
  T *s, *o, *top, *sum;  // [kTile][width], [head_dim][width], [width], [width]
  // Of products to logits of base 2.  Operands that are not rounded hold it in q; pairs hold its sign, so that the largest
  // product has the largest logit.
  T factor;

  // `apart`, a difference of products, as one of logits.  Products are subtracted first: a compiler makes one rounding of
  // s * factor - top, and where logits are in the billions the rounding that top had overflows the exponential.
  DIFFFAST_INLINE Vec<T> to_logits(Vec<T> apart) const {
    if constexpr (std::is_same_v<E, Pair>) return apart * std::abs(factor);
    return apart;
  }
};

// Lets a block look at its queries, rows of q at `from` of a tensor.
template <class S, class E>
DIFFFAST_TARGET void take_queries(const Block<E>& block, const S* from, int64_t rows, int64_t row, int64_t head_dim,
                                  int64_t step) {
  const int64_t width = block.width;
  if constexpr (std::is_same_v<E, Pair>) {
    pair_up(from, rows, row, head_dim, step, block.q, 1, width);
    if (!(block.factor > 0)) {
      const float sign = block.factor < 0 ? -1.0f : 0.0f;
      for (Pair* pair = block.q; pair < block.q + packed<E>(head_dim) * width; ++pair) {
        narrow(sign * widen(pair->first), &pair->first);
        narrow(sign * widen(pair->second), &pair->second);
      }
    }
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < head_dim; ++c) block.q[c * width + i] = block.factor * widen(from[i * row + c * step]);
    }
  }
  for (int64_t i = rows; i < width; ++i) {
    for (int64_t c = 0; c < packed<E>(head_dim); ++c) block.q[c * width + i] = E{};
  }
}

// Adds a tile of keys.
template <class E>
DIFFFAST_TARGET void add_tile(const Block<E>& block, const Part<E>& part, int64_t first, int64_t keys, int64_t head_dim) {
  using T = Sum<E>;
  const int64_t width = block.width;
  matmul(keys, width, packed<E>(head_dim), part.k + first * part.k_row, part.k_row, part.k_column, block.q, width, block.s,
         width);
  for (int64_t i = 0; i < width; i += lanes<T>) {
    const Vec<T> before = load(block.top + i);
    Vec<T> top = before;
    for (int64_t t = 0; t < keys; ++t) top = maximum<T>(top, load(block.s + t * width + i));
    const bool grown = exceeds_anywhere<T>(block.to_logits(top - before), kGrowth);
    if (!grown) top = before;
    Vec<T> sum{};
    for (int64_t t = 0; t < keys; t += kPacked<E>) {
      const T* at = block.s + t * width + i;
      const Vec<T> e = exp2_of(block.to_logits(load(at) - top));
      sum += e;
      if constexpr (std::is_same_v<E, Pair>) {
        const Vec<T> next = t + 1 < keys ? exp2_of(block.to_logits(load(at + width) - top)) : Vec<T>{};
        sum += next;
        store_pairs(block.p + t / 2 * width + i, e, next);
      } else {
        store(block.p + t * width + i, e);
      }
    }
    if (grown) {
      const Vec<T> shrink = exp2_of(block.to_logits(before - top));
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
  matmul(head_dim, width, packed<E>(keys), part.v + first / kPacked<E> * part.v_row, part.v_column, part.v_row, block.p,
         width, block.o, width, true);
}

// mean[map_count][width] += probabilities of the chosen keys.
template <class E>
DIFFFAST_TARGET void add_maps(const JointAttention& p, const Block<E>& block, const Part<E>& text, Sum<E>* mean) {
  using T = Sum<E>;
  for (int64_t m = 0; m < p.map_count; ++m) {
    matmul(int64_t{1}, block.width, packed<E>(p.head_dim), text.k + p.map_tokens[m] * text.k_row, text.k_row,
           text.k_column, block.q, block.width, block.s, block.width);
    for (int64_t i = 0; i < block.width; i += lanes<T>) {
      const Vec<T> e = exp2_of(block.to_logits(load(block.s + i) - load(block.top + i)));
      T* at = mean + m * block.width + i;
      store(at, load(at) + e / load(block.sum + i));
    }
  }
}

template <class S>
DIFFFAST_TARGET void forward(const JointAttention& p, void* out_data, void* maps_data, int64_t begin, int64_t end) {
  using E = Operand<S>;
  using T = Sum<E>;
  S* out = static_cast<S*>(out_data);
  T* maps = static_cast<T*>(maps_data);
  const int64_t dim = p.head_dim;
  std::vector<T> scratch(kRows * (dim + kTile + 2 + p.map_count));
  std::vector<E> operands(kRows * (packed<E>(dim) + (std::is_same_v<E, Pair> ? packed<E>(kTile) : 0)));
  Block<E> block;
  block.q = operands.data();
  block.o = scratch.data();
  block.s = block.o + kRows * dim;
  block.top = block.s + kRows * kTile;
  block.sum = block.top + kRows;
  if constexpr (std::is_same_v<E, Pair>) {
    block.p = block.q + kRows * packed<E>(dim);
  } else {
    block.p = block.s;
  }
  T* mean = block.sum + kRows;
  block.factor = static_cast<T>(p.scale * kLog2E);
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
      take_queries(block, q, rows, p.q.stride[2], dim, p.q.stride[3]);
      std::fill(block.o, block.o + dim * block.width, T{0});
      std::fill(block.sum, block.sum + block.width, T{0});
      std::fill(block.top, block.top + block.width, std::numeric_limits<T>::lowest());
      head.go_to(b, h);
      for (const Part<E>& part : {head.text(), head.pixels()}) {
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
