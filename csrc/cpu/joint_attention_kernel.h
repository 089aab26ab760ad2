// Attention over any number of keys for one instruction set; included by joint_attention.cpp after simd.h, inside a
// namespace.
//
// Keys come in tiles, and the softmax is kept up with a running maximum and sum (online softmax, arXiv 1805.02867; tiles
// as in FlashAttention, arXiv 2205.14135, section 3.1).  Everything is transposed: a vector holds one number of several
// query rows.  So maximum and sum over the keys need no reduction within a vector, and narrow heads fill whole vectors.

#include "operands.h"

// Query rows of a block, at most, and keys of a tile.
constexpr int64_t kRows = 64, kTile = 64;

// Keys and values of one head as what is computed in: element c of key t is at t * row + c * column.
template <class T>
struct Part {
  const T *k, *v;
  int64_t keys, k_row, k_column, v_row, v_column;
};

// Packed, where they are stored as something else: keys [keys][head_dim], then values, of every head and row of the
// text, then of the pixels.
template <class T>
T* packed_part(const JointAttention& p, void* packed, bool text, int64_t row, int64_t h) {
  const int64_t of_text = p.batch / p.repeats * p.heads * p.text_keys;
  const int64_t first = text ? (row * p.heads + h) * p.text_keys : of_text + (row * p.heads + h) * p.keys;
  return static_cast<T*>(packed) + 2 * first * p.head_dim;
}

template <class S>
DIFFFAST_TARGET void pack_parts(const JointAttention& p, void* packed, int64_t begin, int64_t end) {
  using T = typename Compute<S>::type;
  const int64_t of_text = p.text_keys > 0 ? p.batch / p.repeats * p.heads : 0;
  for (int64_t item = begin; item < end; ++item) {
    const bool text = item < of_text;
    const int64_t index = text ? item : item - of_text, h = index % p.heads, row = index / p.heads;
    const int64_t keys = text ? p.text_keys : p.keys;
    T* to = packed_part<T>(p, packed, text, row, h);
    copy_rows<S, T>(text ? p.text_k : p.k, row, h, 0, keys, p.head_dim, T{1}, to, p.head_dim);
    copy_rows<S, T>(text ? p.text_v : p.v, row, h, 0, keys, p.head_dim, T{1}, to + keys * p.head_dim, p.head_dim);
  }
}

template <class S, class T>
Part<T> part_of(const JointAttention& p, void* packed, bool text, int64_t b, int64_t h) {
  const int64_t keys = text ? p.text_keys : p.keys, row = text ? b / p.repeats : b;
  if constexpr (std::is_same_v<S, T>) {
    const View4 &k = text ? p.text_k : p.k, &v = text ? p.text_v : p.v;
    return {static_cast<const T*>(k.data) + row * k.stride[0] + h * k.stride[1],
            static_cast<const T*>(v.data) + row * v.stride[0] + h * v.stride[1],
            keys, k.stride[2], k.stride[3], v.stride[2], v.stride[3]};
  } else {
    const T* k = packed_part<T>(p, packed, text, row, h);
    return {k, k + keys * p.head_dim, keys, p.head_dim, 1, p.head_dim, 1};
  }
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
    Vec<T> sum{};
    for (int64_t t = 0; t < keys; ++t) {
      T* at = block.s + t * width + i;
      const Vec<T> e = exp2_of(load(at) - top);
      store(at, e);
      sum += e;
    }
    const Vec<T> shrink = exp2_of(before - top);
    store(block.top + i, top);
    store(block.sum + i, load(block.sum + i) * shrink + sum);
    for (int64_t c = 0; c < head_dim; ++c) {
      T* at = block.o + c * width + i;
      store(at, load(at) * shrink);
    }
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
DIFFFAST_TARGET void forward(const JointAttention& p, void* packed, void* out_data, void* maps_data, int64_t begin,
                             int64_t end) {
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
      const Part<T> parts[] = {part_of<S, T>(p, packed, true, b, h), part_of<S, T>(p, packed, false, b, h)};
      for (int part = 0; part < 2; ++part) {
        for (int64_t t = 0; t < parts[part].keys; t += kTile) {
          add_tile(block, parts[part], t, std::min(kTile, parts[part].keys - t), dim);
        }
      }
      if (maps) add_maps(p, block, parts[0], mean);
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
