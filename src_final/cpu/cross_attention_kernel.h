// Attention over at most 128 keys for one instruction set; included by cross_attention.cpp after simd.h, inside a namespace.
//
// All keys of a head fit one tile, so softmax needs no running maximum: a block of query rows times the packed keys gives
// all logits at once, and the backward pass makes the probabilities anew, as exact as the first time.  Packed, per key batch and head, with keys and head_dim rounded up to whole vectors and zero there:
// K^T [head_dim][keys], V [keys][head_dim], and for the backward pass K [keys][head_dim], V^T [head_dim][keys].

#include "operands.h"

template <class T>
int64_t pack_elements(const CrossAttention& p) {
  return (p.backward ? 2 : 1) * (p.head_dim * round_up<T>(p.keys) + p.keys * round_up<T>(p.head_dim));
}

template <class T>
struct Packed {
  T *kt, *v, *k, *vt;
  int64_t keys, dim;  // rounded up

  Packed(const CrossAttention& p, const void* base, int64_t item)
      : keys(round_up<T>(p.keys)), dim(round_up<T>(p.head_dim)) {
    kt = const_cast<T*>(static_cast<const T*>(base)) + item * pack_elements<T>(p);
    v = kt + p.head_dim * keys;
    k = v + p.keys * dim;
    vt = k + p.keys * dim;
  }
};

template <class S>
DIFFFAST_TARGET void pack_keys(const CrossAttention& p, void* base, int64_t begin, int64_t end) {
  using T = typename Compute<S>::type;
  for (int64_t item = begin; item < end; ++item) {
    const Packed<T> to(p, base, item);
    const int64_t b = item / p.heads, h = item % p.heads;
    copy_columns<S>(p.k, b, h, p.keys, p.head_dim, to.kt, to.keys);
    copy_rows<S, T>(p.v, b, h, 0, p.keys, p.head_dim, T{1}, to.v, to.dim);
    if (p.backward) {
      copy_rows<S, T>(p.k, b, h, 0, p.keys, p.head_dim, T{1}, to.k, to.dim);
      copy_columns<S>(p.v, b, h, p.keys, p.head_dim, to.vt, to.keys);
    }
  }
}

// In place: logits (in units of ln 2) -> probabilities.
template <class T>
DIFFFAST_TARGET void softmax_rows(const CrossAttention& p, T* s, int64_t rows, int64_t row_size) {
  T valid[lanes<T>];  // of the last vector
  for (int i = 0; i < lanes<T>; ++i) valid[i] = row_size - lanes<T> + i < p.keys;
  const Vec<T> keep = load(valid), none{}, lowest = broadcast(std::numeric_limits<T>::lowest());
  for (int64_t row = 0; row < rows; ++row, s += row_size) {
    T* last = s + row_size - lanes<T>;
    Vec<T> largest = keep > none ? load(last) : lowest;
    for (T* x = s; x < last; x += lanes<T>) largest = maximum<T>(largest, load(x));
    T top = p.sink > 0 ? T{0} : largest[0];
    for (int i = 0; i < lanes<T>; ++i) top = std::max<T>(top, largest[i]);
    Vec<T> sums{};
    for (T* x = s; x < last; x += lanes<T>) {
      const Vec<T> e = exp2_of(load(x) - top);
      store(x, e);
      sums += e;
    }
    // Columns that pad the last vector have logit 0, which may lie far above all others, or NaN: they take no part.
    const Vec<T> e = keep > none ? exp2_of(keep > none ? load(last) - top : none) : none;
    store(last, e);
    sums += e;
    T sum = p.sink > 0 ? static_cast<T>(p.sink) * std::exp2(-top) : T{0};
    for (int i = 0; i < lanes<T>; ++i) sum += sums[i];
    const Vec<T> inverse = broadcast(T{1} / sum);
    for (T* x = s; x <= last; x += lanes<T>) store(x, load(x) * inverse);
  }
}

// Query rows of a block: at most kBlock, blocks of nearly equal size.
constexpr int64_t kBlock = 64;

DIFFFAST_TARGET inline int64_t block_begin(const CrossAttention& p, int64_t block) {
  const int64_t blocks = (p.queries + kBlock - 1) / kBlock;
  return p.queries * block / blocks;
}

template <class S>
DIFFFAST_TARGET void forward(const CrossAttention& p, const void* packed, void* out_data, void* maps_data, int64_t begin,
                             int64_t end) {
  using T = typename Compute<S>::type;
  S* out = static_cast<S*>(out_data);
  T* maps = static_cast<T*>(maps_data);
  const int64_t keys = round_up<T>(p.keys), dim = round_up<T>(p.head_dim);
  std::vector<T> scratch(kBlock * (p.head_dim + 2 * keys + dim));
  T* q = scratch.data();
  T* s = q + kBlock * p.head_dim;
  T* mean = s + kBlock * keys;
  T* o = mean + kBlock * keys;
  const T factor = static_cast<T>(p.scale * kLog2E);
  const int64_t blocks = (p.queries + kBlock - 1) / kBlock, groups = maps ? 1 : p.heads, share = p.heads / groups;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item % blocks, group = item / blocks % groups, b = item / blocks / groups;
    const int64_t first = block_begin(p, block), rows = block_begin(p, block + 1) - first;
    if (maps) std::fill(mean, mean + rows * keys, T{0});
    for (int64_t h = group * share; h < (group + 1) * share; ++h) {
      const Packed<T> kv(p, packed, b / p.repeats * p.heads + h);
      copy_rows<S, T>(p.q, b, h, first, rows, p.head_dim, factor, q, p.head_dim);
      matmul(rows, keys, p.head_dim, q, p.head_dim, int64_t{1}, kv.kt, keys, s, keys);
      softmax_rows(p, s, rows, keys);
      if (maps) {
        for (int64_t i = 0; i < rows * keys; i += lanes<T>) store(mean + i, load(mean + i) + load(s + i));
      }
      matmul(rows, dim, p.keys, s, keys, int64_t{1}, kv.v, dim, o, dim);
      for (int64_t row = 0; row < rows; ++row) {
        S* to = out + ((b * p.queries + first + row) * p.heads + h) * p.head_dim;
        for (int64_t c = 0; c < p.head_dim; ++c) narrow(o[row * dim + c], to + c);
      }
    }
    if (maps) {
      T* to = maps + (b * p.queries + first) * p.map_count;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t m = 0; m < p.map_count; ++m) *to++ = mean[row * keys + p.map_tokens[m]] / static_cast<T>(p.heads);
      }
    }
  }
}

template <class S>
DIFFFAST_TARGET void backward(const CrossAttention& p, const CrossAttentionGradients& g, const void* packed, int64_t begin,
                              int64_t end) {
  using T = typename Compute<S>::type;
  const T* maps = static_cast<const T*>(g.maps);
  S *dq = static_cast<S*>(g.q), *dk = static_cast<S*>(g.k), *dv = static_cast<S*>(g.v);
  const int64_t keys = round_up<T>(p.keys), dim = round_up<T>(p.head_dim);
  std::vector<T> scratch(kBlock * (3 * dim + 2 * keys) + 2 * p.keys * dim);
  T* q = scratch.data();
  T* grad = q + kBlock * dim;
  T* o = grad + kBlock * dim;
  T* s = o + kBlock * dim;
  T* ds = s + kBlock * keys;
  T* sum_k = ds + kBlock * keys;
  T* sum_v = sum_k + p.keys * dim;
  const T factor = static_cast<T>(p.scale * kLog2E), scale = static_cast<T>(p.scale);
  const int64_t blocks = (p.queries + kBlock - 1) / kBlock;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t h = item % p.heads;
    const Packed<T> kv(p, packed, item);
    std::fill(sum_k, sum_k + 2 * p.keys * dim, T{0});
    for (int64_t b = item / p.heads * p.repeats; b < (item / p.heads + 1) * p.repeats; ++b) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block_begin(p, block), rows = block_begin(p, block + 1) - first;
        copy_rows<S, T>(p.q, b, h, first, rows, p.head_dim, factor, q, dim);
        matmul(rows, keys, p.head_dim, q, dim, int64_t{1}, kv.kt, keys, s, keys);
        softmax_rows(p, s, rows, keys);
        if (g.out.data) {
          copy_rows<S, T>(g.out, b, h, first, rows, p.head_dim, T{1}, grad, dim);
          matmul(rows, keys, p.head_dim, grad, dim, int64_t{1}, kv.vt, keys, ds, keys);
          if (dv) matmul(p.keys, dim, rows, s, int64_t{1}, keys, grad, dim, sum_v, dim, true);
        } else {
          std::fill(ds, ds + rows * keys, T{0});
        }
        if (maps) {
          const T* from = maps + (b * p.queries + first) * p.map_count;
          for (int64_t row = 0; row < rows; ++row) {
            for (int64_t m = 0; m < p.map_count; ++m) ds[row * keys + p.map_tokens[m]] += *from++ / static_cast<T>(p.heads);
          }
        }
        // dS = P (dP - sum of P dP over the keys); the sink's part of that sum is zero, as its dP is.
        for (int64_t row = 0; row < rows; ++row) {
          T *x = s + row * keys, *dx = ds + row * keys;
          Vec<T> sums{};
          for (int64_t t = 0; t < keys; t += lanes<T>) sums += load(x + t) * load(dx + t);
          T delta = 0;
          for (int i = 0; i < lanes<T>; ++i) delta += sums[i];
          for (int64_t t = 0; t < keys; t += lanes<T>) store(dx + t, load(x + t) * (load(dx + t) - delta));
        }
        if (dq) {
          matmul(rows, dim, p.keys, ds, keys, int64_t{1}, kv.k, dim, o, dim);
          for (int64_t row = 0; row < rows; ++row) {
            S* to = dq + ((b * p.queries + first + row) * p.heads + h) * p.head_dim;
            for (int64_t c = 0; c < p.head_dim; ++c) narrow(scale * o[row * dim + c], to + c);
          }
        }
        if (dk) matmul(p.keys, dim, rows, ds, int64_t{1}, keys, q, dim, sum_k, dim, true);
      }
    }
    if (dk) {
      // The rows of q carry scale / ln 2.
      for (int64_t t = 0; t < p.keys; ++t) {
        for (int64_t c = 0; c < p.head_dim; ++c) {
          const int64_t to = (item * p.keys + t) * p.head_dim + c;
          narrow(sum_k[t * dim + c] * static_cast<T>(kLn2), dk + to);
          narrow(sum_v[t * dim + c], dv + to);
        }
      }
    }
  }
}
