// Queries, keys and values as joint_attention_kernel.h's products take them, for one instruction set; included by it,
// inside a namespace: no include guard.

#include "operands.h"
#ifdef DIFFFAST_TILES
#include "tiles.h"
#endif

// Zeros that begin with a cache line: vectors and rows of tiles, which are as long as these, would lie across two.
template <class T>
class Lines {
 public:
  explicit Lines(int64_t size = 0) { resize(size); }
  void resize(int64_t size) {
    memory_.assign(static_cast<size_t>(size) + 64 / sizeof(T), T{});
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    data_ = memory_.data() + (64 - address % 64) % 64 / sizeof(T);
  }
  T* data() const { return data_; }

 private:
  std::vector<T> memory_;
  T* data_ = nullptr;
};

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
#ifdef DIFFFAST_TILES
template <class E>
constexpr bool kInTiles = std::is_same_v<E, Pair>;
#else
template <class E>
constexpr bool kInTiles = false;
constexpr int64_t whole_tiles(int64_t n) { return n; }
#endif
// Query rows of a block, at most, and keys of a step.  In tiles the logits, probabilities and sums of a step, and what it
// reads of keys and values, fit into the first-level cache together: steps of 128 keys took a third longer.
template <class E>
constexpr int64_t kRows = kInTiles<E> ? 32 : 64;
constexpr int64_t kTile = 64;
// How many operands, and how many rows or columns of them, n elements are laid out as.
template <class E>
constexpr int64_t packed(int64_t n) {
  const int64_t whole = (n + kPacked<E> - 1) / kPacked<E>;
  return kInTiles<E> ? whole_tiles(whole) : whole;
}
template <class E>
constexpr int64_t laid_out(int64_t n) {
  return kInTiles<E> ? whole_tiles(n) : n;
}

// Keys and values of one head as operands: of key t, operand c along the head is at k + t * k_row + c * k_column; of
// element c, operand t along the keys at v + t * v_row + c * v_column.
template <class E>
struct Part {
  const E *k, *v;
  int64_t keys, k_row, k_column, v_row, v_column;
};

#ifdef DIFFFAST_BF16_PRODUCTS
constexpr __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

// to[j][i] = pair j of row i of `from`, for up to 16 rows and columns: neighbours, or with `apart` an element of each of
// two rows, which are `second` apart.
template <bool apart>
DIFFFAST_TARGET inline void transpose_pairs(const BFloat16* from, int64_t row, int64_t second, int64_t rows,
                                            int64_t columns, Pair* to, int64_t to_row) {
  const __mmask16 read = first_lanes(columns), written = first_lanes(rows);
  Vec<float> x[16] = {};
  for (int64_t i = 0; i < rows; ++i, from += row) {
    if constexpr (apart) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(read, from));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(read, from + second));
      x[i] = (Vec<float>)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    } else {
      x[i] = (Vec<float>)_mm512_maskz_loadu_epi32(read, from);
    }
  }
  transpose<float>(x);
  for (int64_t j = 0; j < columns; ++j) _mm512_mask_storeu_epi32(to + j * to_row, written, (__m512i)x[j]);
}

// to[j][i] = factor[i] x[i][j], x transposed: x[j][i] at from + j * row.
DIFFFAST_TARGET inline void transpose_and_narrow(const float* from, int64_t row, Vec<float> factor, int64_t rows,
                                                 int64_t columns, BFloat16* to, int64_t to_row) {
  Vec<float> x[16] = {};
  for (int64_t j = 0; j < columns; ++j) x[j] = load(from + j * row) * factor;
  transpose<float>(x);
  for (int64_t i = 0; i < rows; ++i) {
    _mm256_mask_storeu_epi16(to + i * to_row, first_lanes(columns), (__m256i)_mm512_cvtneps_pbh((__m512)x[i]));
  }
}

// 2^x for x < 128, for probabilities that are rounded to bfloat16, and their sums: a polynomial of the third degree, whose
// relative error of 9e-5 is a twentieth of that rounding's (as in FlashAttention-4), and none for whole numbers.  Zero for
// minus infinity, NaN for NaN.
DIFFFAST_INLINE Vec<float> exp2_roughly(Vec<float> x) {
  const Vec<float> f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // zero for minus infinity
  const Vec<float> p = (broadcast(0.0770672403f) * f + 0.227644978f) * f + 0.695116631f;
  return _mm512_scalef_ps(p * f + 1.0f, x);  // by two to the floor of x
}
#endif

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
#ifdef DIFFFAST_BF16_PRODUCTS
  } else if (step == 1 && to_row == 1) {
    for (int64_t i = 0; i < rows; i += 16) {
      for (int64_t j = 0; j < whole; j += 16) {
        transpose_pairs<false>(from + i * row + 2 * j, row, 0, std::min<int64_t>(16, rows - i),
                               std::min<int64_t>(16, whole - j), to + i + j * to_step, to_step);
      }
    }
  } else if (row == 1 && to_step == 1) {
    for (int64_t i = 0; i < rows; i += 16) {
      for (int64_t j = 0; j < whole; j += 16) {
        transpose_pairs<true>(from + i + 2 * j * step, 2 * step, step, std::min<int64_t>(16, whole - j),
                              std::min<int64_t>(16, rows - i), to + i * to_row + j, to_row);
      }
    }
#endif
  } else if (row == 1) {
    for (int64_t j = 0; j < whole; ++j) {
      const BFloat16 *first = from + 2 * j * step, *second = first + step;
      for (int64_t i = 0; i < rows; ++i) to[i * to_row + j * to_step] = {first[i], second[i]};
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

// The keys and values of heads, of the text and of the pixels, as a thread reads them.
template <class S>
class Head {
 public:
  using E = Operand<S>;

  // lay_out: what are operands already is copied as well, row after row.  As it comes, the rows of a head are as far
  // apart as those of a picture's pixels: in many pages, and in few of the first cache's sets.
  // kept: how many heads, one after the other, are copied before the first one is needed again.
  Head(const JointAttention& p, bool lay_out, int64_t kept)
      : p_(p), copies_(!std::is_same_v<S, E> || lay_out), heads_(static_cast<size_t>(kept)) {
    // Zeros beyond the sizes stay: what is copied for one head lies where it lay for the one before.
    if (copies_) memory_.resize(kept * count_operands());
  }

  DIFFFAST_TARGET void go_to(int64_t b, int64_t h) {
    const int64_t place = h % static_cast<int64_t>(heads_.size());
    now_ = &heads_[place];
    if (b == now_->b && h == now_->h) return;
    now_->b = b;
    now_->h = h;
    E* to = memory_.data() + (copies_ ? place * count_operands() : 0);
    for (const bool text : {true, false}) {
      const View4 &k = text ? p_.text_k : p_.k, &v = text ? p_.text_v : p_.v;
      const int64_t keys = text ? p_.text_keys : p_.keys, row = text ? b / p_.repeats : b;
      Part<E>& part = text ? now_->text : now_->pixels;
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

  const Part<E>& text() const { return now_->text; }
  const Part<E>& pixels() const { return now_->pixels; }

 private:
  struct Both {
    int64_t b = -1, h = -1;
    Part<E> text{}, pixels{};
  };

  int64_t count_operands() const {
    return count_operands(p_.text_keys, p_.head_dim) + count_operands(p_.keys, p_.head_dim);
  }
  static int64_t count_operands(int64_t keys, int64_t dim) {
    const int64_t pairs = kInTiles<E> ? (keys + kTile - 1) / kTile * kTile / 2 : packed<E>(keys);
    return laid_out<E>(keys) * packed<E>(dim) + pairs * laid_out<E>(dim);
  }

  // Keys and values row after row; of pairs, two rows of values in one.  In tiles, values are transposed, step by step.
  DIFFFAST_TARGET Part<E> copy(const View4& k, const View4& v, int64_t b, int64_t h, int64_t keys, E* to) const {
    const int64_t dim = p_.head_dim, k_row = packed<E>(dim);
    E* values = to + laid_out<E>(keys) * k_row;
    if constexpr (std::is_same_v<E, Pair>) {
      const auto start = [&](const View4& x) {
        return static_cast<const BFloat16*>(x.data) + b * x.stride[0] + h * x.stride[1];
      };
      pair_up(start(k), keys, k.stride[2], dim, k.stride[3], to, k_row, 1);
      if constexpr (kInTiles<E>) {
        const int64_t v_row = laid_out<E>(dim);
        for (int64_t t = 0; t < keys; t += kTile) {
          pair_up(start(v) + t * v.stride[2], dim, v.stride[3], std::min(kTile, keys - t), v.stride[2],
                  values + t / 2 * v_row, kTile / 2, 1);
        }
        return {to, values, keys, k_row, 1, v_row, kTile / 2};
      }
      pair_up(start(v), dim, v.stride[3], keys, v.stride[2], values, 1, dim);
    } else {
      copy_rows<S, E>(k, b, h, 0, keys, dim, E{1}, to, dim);
      copy_rows<S, E>(v, b, h, 0, keys, dim, E{1}, values, dim);
    }
    return {to, values, keys, k_row, 1, dim, 1};
  }

  const JointAttention& p_;
  const bool copies_;
  Lines<E> memory_;
  std::vector<Both> heads_;
  Both* now_ = nullptr;
};
