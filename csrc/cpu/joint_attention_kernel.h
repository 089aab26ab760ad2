// Attention over any number of keys for one instruction set; included by joint_attention.cpp after simd.h, inside a
// namespace.
//
// Keys come in tiles, and the softmax is kept up with a running maximum and sum (online softmax, arXiv 1805.02867; tiles
// as in FlashAttention, arXiv 2205.14135, section 3.1).  Everything is transposed: a vector holds one number of several
// query rows.  So maximum and sum over the keys need no reduction within a vector, and narrow heads fill whole vectors.
//
// Where a set multiplies pairs of bfloat16, these are the operands, and probabilities are rounded to bfloat16, as in
// PyTorch's kernels: one instruction for two products, and no copies in float32.  With AMX one instruction does 16 x 16 x
// 32 products: operands are laid out in whole tiles of its registers, with zeros beyond the sizes.

#include "joint_attention_operands.h"

// Logits of base 2 may be larger than the running maximum by so much before all that is summed up is scaled anew, which
// would otherwise happen at nearly every tile.  Exponentials are then at most 2^8 (as in FlashAttention-4).
constexpr int kGrowth = 8;

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
  T *s, *o, *top, *sum;  // [kTile][width], [laid out head_dim][width], [width], [width]
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
  const int64_t used = (head_dim + kPacked<E> - 1) / kPacked<E>;
  std::fill(block.q + used * width, block.q + packed<E>(head_dim) * width, E{});
}

// s = logits of keys from `first` on, before they are scaled.
template <class E>
DIFFFAST_TARGET void multiply_queries(const Block<E>& block, const Part<E>& part, int64_t first, int64_t keys,
                                      int64_t head_dim) {
  const int64_t width = block.width;
  const E* k = part.k + first * part.k_row;
#ifdef DIFFFAST_TILES
  if constexpr (kInTiles<E>) {
    return matmul_of_tiles(whole_tiles(keys), width, packed<E>(head_dim), k, part.k_row, block.q, width, block.s, width);
  }
#endif
  matmul(keys, width, packed<E>(head_dim), k, part.k_row, part.k_column, block.q, width, block.s, width);
}

// o += values of keys from `first` on, by their probabilities.
template <class E>
DIFFFAST_TARGET void add_values(const Block<E>& block, const Part<E>& part, int64_t first, int64_t keys, int64_t head_dim) {
  const int64_t width = block.width;
  const E* v = part.v + first / kPacked<E> * part.v_row;
#ifdef DIFFFAST_TILES
  if constexpr (kInTiles<E>) {
    const int64_t used = (keys + 1) / 2, pairs = packed<E>(keys);
    std::fill(block.p + used * width, block.p + pairs * width, E{});
    return matmul_of_tiles(whole_tiles(head_dim), width, pairs, v, part.v_column, block.p, width, block.o, width, true);
  }
#endif
  matmul(head_dim, width, packed<E>(keys), v, part.v_column, part.v_row, block.p, width, block.o, width, true);
}

// Adds a step's keys.
template <class E>
DIFFFAST_TARGET void add_tile(const Block<E>& block, const Part<E>& part, int64_t first, int64_t keys, int64_t head_dim) {
  using T = Sum<E>;
  const int64_t width = block.width;
  multiply_queries(block, part, first, keys, head_dim);
  for (int64_t i = 0; i < width; i += lanes<T>) {
    const Vec<T> before = load(block.top + i);
    const T* at = block.s + i;
    Vec<T> tops[4] = {before, before, before, before};
    int64_t t = 0;
    for (; t + 4 <= keys; t += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) tops[j] = maximum<T>(tops[j], load(at + (t + j) * width));
    }
    for (; t < keys; ++t) tops[0] = maximum<T>(tops[0], load(at + t * width));
    Vec<T> top = maximum<T>(maximum<T>(tops[0], tops[1]), maximum<T>(tops[2], tops[3]));
    const bool grown = exceeds_anywhere<T>(block.to_logits(top - before), kGrowth);
    if (!grown) top = before;
    Vec<T> sum{};
    if constexpr (std::is_same_v<E, Pair>) {
      Vec<T> sums[4] = {};
      for (t = 0; t + 4 <= keys; t += 4) {
        Vec<T> e[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          e[j] = exp2_roughly(block.to_logits(load(at + (t + j) * width) - top));
          sums[j] += e[j];
        }
        store_pairs(block.p + t / 2 * width + i, e[0], e[1]);
        store_pairs(block.p + (t / 2 + 1) * width + i, e[2], e[3]);
      }
      sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      for (; t < keys; t += 2) {
        const Vec<T> e = exp2_roughly(block.to_logits(load(at + t * width) - top));
        const Vec<T> next = t + 1 < keys ? exp2_roughly(block.to_logits(load(at + (t + 1) * width) - top)) : Vec<T>{};
        sum += e + next;
        store_pairs(block.p + t / 2 * width + i, e, next);
      }
    } else {
      for (t = 0; t < keys; ++t) {
        const Vec<T> e = exp2_of(block.to_logits(load(at + t * width) - top));
        sum += e;
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
  add_values(block, part, first, keys, head_dim);
}

// mean[map_count][width] += probabilities of the chosen keys.  Their logits are multiplied out as they were for the sum:
// where they are huge, rounded otherwise they would lie far apart.
template <class E>
DIFFFAST_TARGET void add_maps(const JointAttention& p, const Block<E>& block, const Part<E>& text, Sum<E>* mean) {
  using T = Sum<E>;
  const int64_t together = laid_out<E>(1);
  for (int64_t m = 0, first = -1; m < p.map_count; ++m) {
    const int64_t within = p.map_tokens[m] % together;
    if (p.map_tokens[m] - within != first) {
      first = p.map_tokens[m] - within;
      multiply_queries(block, text, first, together, p.head_dim);
    }
    const T* s = block.s + within * block.width;
    for (int64_t i = 0; i < block.width; i += lanes<T>) {
      const Vec<T> e = exp2_of(block.to_logits(load(s + i) - load(block.top + i)));
      T* at = mean + m * block.width + i;
      store(at, load(at) + e / load(block.sum + i));
    }
  }
}

// to[rows][dim] = o / sum, transposed.
template <class E, class S>
DIFFFAST_TARGET void write_out(const Block<E>& block, int64_t rows, int64_t dim, S* to, int64_t to_row) {
  using T = Sum<E>;
#ifdef DIFFFAST_BF16_PRODUCTS
  if constexpr (std::is_same_v<E, Pair>) {
    for (int64_t row = 0; row < rows; row += 16) {
      const Vec<float> inverse = 1.0f / load(block.sum + row);
      for (int64_t c = 0; c < dim; c += 16) {
        transpose_and_narrow(block.o + c * block.width + row, block.width, inverse, std::min<int64_t>(16, rows - row),
                             std::min<int64_t>(16, dim - c), to + row * to_row + c, to_row);
      }
    }
    return;
  }
#endif
  for (int64_t row = 0; row < rows; ++row, to += to_row) {
    const T inverse = T{1} / block.sum[row];
    for (int64_t c = 0; c < dim; ++c) narrow(inverse * block.o[c * block.width + row], to + c);
  }
}

// Blocks of query rows.
template <class S>
int64_t count_blocks(const JointAttention& p) {
  return (p.queries + kRows<Operand<S>> - 1) / kRows<Operand<S>>;
}

template <class S>
DIFFFAST_TARGET void forward(const JointAttention& p, void* out_data, void* maps_data, int64_t begin, int64_t end) {
  using E = Operand<S>;
  using T = Sum<E>;
  S* out = static_cast<S*>(out_data);
  T* maps = static_cast<T*>(maps_data);
  const int64_t dim = p.head_dim;
#ifdef DIFFFAST_TILES
  std::optional<TileRegisters> registers;
  if constexpr (kInTiles<E>) registers.emplace();
#endif
  Lines<T> scratch(kRows<E> * (laid_out<E>(dim) + kTile + 2 + p.map_count));
  Lines<E> operands(kRows<E> * (packed<E>(dim) + (std::is_same_v<E, Pair> ? packed<E>(kTile) : 0)));
  Block<E> block;
  block.q = operands.data();
  block.o = scratch.data();
  block.s = block.o + kRows<E> * laid_out<E>(dim);
  block.top = block.s + kRows<E> * kTile;
  block.sum = block.top + kRows<E>;
  if constexpr (std::is_same_v<E, Pair>) {
    block.p = block.q + kRows<E> * packed<E>(dim);
  } else {
    block.p = block.s;
  }
  T* mean = block.sum + kRows<E>;
  block.factor = static_cast<T>(p.scale * kLog2E);
  const int64_t blocks = count_blocks<S>(p), groups = maps ? 1 : p.heads, share = p.heads / groups;
  Head<S> head(p, !maps && pays_to_lay_out(p, blocks), share);  // with maps, each block goes through all heads

  for (int64_t item = begin; item < end; ++item) {
    const int64_t index = item % blocks, group = item / blocks % groups, b = item / blocks / groups;
    // Blocks of nearly equal size.
    const int64_t first = p.queries * index / blocks, rows = p.queries * (index + 1) / blocks - first;
    block.width = round_up<T>(rows);
    if (maps) std::fill(mean, mean + p.map_count * block.width, T{0});
    for (int64_t h = group * share; h < (group + 1) * share; ++h) {
      const S* q = static_cast<const S*>(p.q.data) + b * p.q.stride[0] + h * p.q.stride[1] + first * p.q.stride[2];
      take_queries(block, q, rows, p.q.stride[2], dim, p.q.stride[3]);
      std::fill(block.o, block.o + laid_out<E>(dim) * block.width, T{0});
      std::fill(block.sum, block.sum + block.width, T{0});
      std::fill(block.top, block.top + block.width, std::numeric_limits<T>::lowest());
      head.go_to(b, h);
      for (const Part<E>& part : {head.text(), head.pixels()}) {
        for (int64_t t = 0; t < part.keys; t += kTile) {
          add_tile(block, part, t, std::min(kTile, part.keys - t), dim);
        }
      }
      if (maps) add_maps(p, block, head.text(), mean);
      write_out(block, rows, dim, out + ((b * p.queries + first) * p.heads + h) * dim, p.heads * dim);
    }
    if (maps) {
      T* to = maps + (b * p.queries + first) * p.map_count;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t m = 0; m < p.map_count; ++m) *to++ = mean[m * block.width + row] / static_cast<T>(p.heads);
      }
    }
  }
}
