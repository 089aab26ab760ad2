// Vectors of one instruction set.  Included once per set, inside a namespace, by every_set.h: no include guard.
// Before: DIFFFAST_TARGET (function attribute), DIFFFAST_VECTOR_BYTES, DIFFFAST_REGISTERS.  Portable: GCC and Clang vector
// extensions, so that one source serves AVX-512, AVX2, SSE2 and NEON.

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(DIFFFAST_VECTOR_BYTES)));
  typedef T loose __attribute__((vector_size(DIFFFAST_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};
template <class T>
using Vec = typename Vector<T>::type;
template <class T>
constexpr int lanes = DIFFFAST_VECTOR_BYTES / static_cast<int>(sizeof(T));

#define DIFFFAST_INLINE DIFFFAST_TARGET inline __attribute__((always_inline))

template <class T>
DIFFFAST_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Vector<T>::loose*>(p);
}

template <class T>
DIFFFAST_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Vector<T>::loose*>(p) = v;
}

DIFFFAST_INLINE float widen(float x) { return x; }
DIFFFAST_INLINE double widen(double x) { return x; }
DIFFFAST_INLINE float widen(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

DIFFFAST_INLINE void narrow(float x, float* to) { *to = x; }
DIFFFAST_INLINE void narrow(double x, double* to) { *to = x; }
DIFFFAST_INLINE void narrow(float x, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  to->bits = static_cast<uint16_t>(x == x ? rounded : 0x7FC0);
}

// As many elements as fit a vector of what they are computed in.
DIFFFAST_INLINE Vec<float> load_wide(const float* p) { return load(p); }
DIFFFAST_INLINE Vec<double> load_wide(const double* p) { return load(p); }
DIFFFAST_INLINE Vec<float> load_wide(const BFloat16* p) {
  typedef uint16_t Half __attribute__((vector_size(DIFFFAST_VECTOR_BYTES / 2)));
  typedef uint32_t Int __attribute__((vector_size(DIFFFAST_VECTOR_BYTES)));
  Half bits;
  std::memcpy(&bits, p, sizeof bits);
  return (Vec<float>)(__builtin_convertvector(bits, Int) << 16);
}

DIFFFAST_INLINE void store_narrow(Vec<float> v, float* to) { store(to, v); }
DIFFFAST_INLINE void store_narrow(Vec<double> v, double* to) { store(to, v); }
DIFFFAST_INLINE void store_narrow(Vec<float> v, BFloat16* to) {
  typedef uint16_t Half __attribute__((vector_size(DIFFFAST_VECTOR_BYTES / 2)));
  typedef uint32_t Int __attribute__((vector_size(DIFFFAST_VECTOR_BYTES)));
  const Int bits = (Int)v, rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // as narrow()
  const Half half = __builtin_convertvector(v == v ? rounded : rounded * 0 + 0x7FC0, Half);
  std::memcpy(to, &half, sizeof half);
}

template <class T>
DIFFFAST_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <class T>
DIFFFAST_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <class T>
DIFFFAST_INLINE double add_lanes(Vec<T> v) {
  double sum = 0;
  for (int i = 0; i < lanes<T>; ++i) sum += v[i];
  return sum;
}

// One step of the transposition below: `step` neighbours of every 2 * step lanes change places.
template <class T, int step, size_t... lane>
DIFFFAST_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::index_sequence<lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  const Vec<T> low = __builtin_shufflevector(a, b, (lane & step ? lanes<T> + lane - step : lane)...);
  b = __builtin_shufflevector(a, b, (lane & step ? lanes<T> + lane : lane + step)...);
#else
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Index __attribute__((vector_size(DIFFFAST_VECTOR_BYTES)));
  const Vec<T> low = __builtin_shuffle(a, b, Index{(lane & step ? lanes<T> + lane - step : lane)...});
  b = __builtin_shuffle(a, b, Index{(lane & step ? lanes<T> + lane : lane + step)...});
#endif
  a = low;
}

// In place: lane j of rows[i] -> lane i of rows[j].
template <class T, int step = 1>
DIFFFAST_INLINE void transpose(Vec<T>* rows) {
  if constexpr (step < lanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i) {
      if (!(i & step)) exchange<T, step>(rows[i], rows[i + step], std::make_index_sequence<lanes<T>>{});
    }
    transpose<T, 2 * step>(rows);
  }
}

// 2^f for -1/2 <= f <= 1/2: Taylor series of exp(f ln 2) to the seventh power, relative error below 1e-8.
DIFFFAST_INLINE Vec<float> exp2_fraction(Vec<float> f) {
  Vec<float> p = broadcast(1.525273380405984e-5f);
  p = p * f + 1.540353039338161e-4f;
  p = p * f + 1.333355814642844e-3f;
  p = p * f + 9.618129107628477e-3f;
  p = p * f + 5.550410866482158e-2f;
  p = p * f + 2.402265069591007e-1f;
  p = p * f + 6.931471805599453e-1f;
  return p * f + 1.0f;
}

// 2^x for -126 <= x < 128.  For 128 it is exactly infinity and for -127 exactly zero, as the exponent's field says so;
// in between a subnormal number, not the right one.
DIFFFAST_INLINE Vec<float> exp2_within(Vec<float> x) {
  typedef uint32_t Int __attribute__((vector_size(DIFFFAST_VECTOR_BYTES)));
  // Adding 1.5 * 2^23 rounds to an integer, which then sits in the low bits of the sum. Unsigned: NaN is passed too.
  const Vec<float> shifted = x + 12582912.0f;
  const Vec<float> p = exp2_fraction(x - (shifted - 12582912.0f));
  return (Vec<float>)((Int)p + (((Int)shifted - 0x4B400000u) << 23));
}

// 2^x for x < 128, NaN for NaN; zero below 2^-127 (AVX-512: 2^-125).  Not the smallest number instead: it would count
// where a value is huge, or where all logits are minus infinity.
#if DIFFFAST_VECTOR_BYTES == 64
DIFFFAST_INLINE Vec<float> exp2_of(Vec<float> x) {
  const __mmask16 kept = _mm512_cmp_ps_mask(x, broadcast(-125.0f), _CMP_NLT_UQ);  // NaN is
  const Vec<float> n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_maskz_scalef_ps(kept, exp2_fraction(x - n), n);
}
#else
DIFFFAST_INLINE Vec<float> exp2_of(Vec<float> x) {
  const Vec<float> lowest = broadcast(-127.0f);
  return x == x ? exp2_within(x < lowest ? lowest : x) : x;
}
#endif

DIFFFAST_INLINE Vec<double> exp2_of(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

// Whether a number of x is larger than the limit, or NaN.
template <class T>
DIFFFAST_INLINE bool exceeds_anywhere(Vec<T> x, T limit) {
#if DIFFFAST_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask(x, broadcast(limit), _CMP_NLE_UQ) != 0;
#endif
  bool found = false;
  for (int i = 0; i < lanes<T>; ++i) found |= !(x[i] <= limit);
  return found;
}

// Natural logarithm of positive normal numbers, NaN for NaN.
DIFFFAST_INLINE Vec<float> log_of(Vec<float> x) {
  typedef int32_t Int __attribute__((vector_size(DIFFFAST_VECTOR_BYTES)));
  // x = 2^n m with m in [sqrt(1/2), sqrt(2)); 0x3F3504F3 is sqrt(1/2).
  const Int n = ((Int)x - 0x3F3504F3) >> 23;
  const Vec<float> m = (Vec<float>)((Int)x - (n << 23)), exponent = __builtin_convertvector(n, Vec<float>);
  // With s = f / (2 + f), log m = 2 artanh s = 2 s + s r; 2 s = f - s f, where f is exact.  r is artanh's Taylor series
  // up to s^9: relative error below 3e-9.
  const Vec<float> f = m - 1.0f, s = f / (f + 2.0f), z = s * s;
  Vec<float> r = broadcast(2.0f / 9);
  r = r * z + 2.0f / 7;
  r = r * z + 2.0f / 5;
  r = r * z + 2.0f / 3;
  r = r * z;
  // ln 2 in two parts, so that n times the larger one is exact.
  const Vec<float> result = exponent * 0.693145751953125f + (f - (s * (f - r) - exponent * 1.428606820309417e-6f));
  return x == x ? result : x;
}

DIFFFAST_INLINE Vec<double> log_of(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::log(x[i]);
  return x;
}

// What products of two operands are added up in.
template <class E>
struct Products {
  using type = E;
};
template <class E>
using Sum = typename Products<E>::type;

DIFFFAST_INLINE Vec<float> add_product(Vec<float> sum, Vec<float> a, Vec<float> b) { return sum + a * b; }
DIFFFAST_INLINE Vec<double> add_product(Vec<double> sum, Vec<double> a, Vec<double> b) { return sum + a * b; }

#ifdef DIFFFAST_BF16_PRODUCTS
template <>
struct Products<Pair> {
  using type = float;
};

typedef uint32_t PairBits __attribute__((vector_size(DIFFFAST_VECTOR_BYTES)));

DIFFFAST_INLINE PairBits load(const Pair* p) {
  PairBits pairs;
  std::memcpy(&pairs, p, sizeof pairs);
  return pairs;
}

DIFFFAST_INLINE PairBits broadcast(Pair x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits - PairBits{};
}

// Lane i of the pairs: lanes i of first and second, rounded to nearest, ties to even.
DIFFFAST_INLINE void store_pairs(Pair* p, Vec<float> first, Vec<float> second) {
  typedef uint16_t Half __attribute__((vector_size(DIFFFAST_VECTOR_BYTES)));
  const Half order = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  const __m512i pairs = _mm512_permutexvar_epi16((__m512i)order, rounded);
  std::memcpy(p, &pairs, sizeof pairs);
}

// The instruction takes subnormal numbers as zeros, those of bfloat16 too.
DIFFFAST_INLINE Vec<float> add_product(Vec<float> sum, PairBits a, PairBits b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

// Products are summed in runs of this length, and the runs' sums are added up: rounding errors of one long chain of
// additions would exceed those of other libraries.
constexpr int64_t kRun = 32;

// C[MR, NV vectors] = (accumulate ? C : 0) + A B over `depth`; A is read at a[i * a_row + k * a_col].  E: float, double
// or Pair, of which each counts as one.
template <class E, int MR, int NV>
DIFFFAST_INLINE void matmul_tile(int64_t depth, const E* a, int64_t a_row, int64_t a_col, const E* b, int64_t b_row,
                                 Sum<E>* c, int64_t c_row, bool accumulate) {
  using T = Sum<E>;
  for (int64_t start = 0; start < depth; start += kRun, accumulate = true) {
    const int64_t stop = std::min(start + kRun, depth);
    Vec<T> sum[MR][NV];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) sum[i][j] = Vec<T>{};
    }
    for (int64_t k = start; k < stop; ++k) {
      decltype(load(b)) row[NV];
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) row[j] = load(b + k * b_row + j * lanes<T>);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const auto x = broadcast(a[i * a_row + k * a_col]);
#pragma GCC unroll 16
        for (int j = 0; j < NV; ++j) sum[i][j] = add_product(sum[i][j], x, row[j]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) {
        T* to = c + i * c_row + j * lanes<T>;
        store(to, accumulate ? load(to) + sum[i][j] : sum[i][j]);
      }
    }
  }
}

// Widest panel of columns, in vectors, and rows per tile, so that sums, one row of B and one element of A fit the registers.
constexpr int kPanel = DIFFFAST_REGISTERS >= 32 ? 5 : 2;
constexpr int tile_rows(int panel) {
  const int fitting = (DIFFFAST_REGISTERS - 2 - panel) / panel;
  return fitting < 8 ? fitting : 8;
}

template <class E, int NV, int MR>
DIFFFAST_TARGET void matmul_rest(int64_t rows, int64_t depth, const E* a, int64_t a_row, int64_t a_col, const E* b,
                                 int64_t b_row, Sum<E>* c, int64_t c_row, bool accumulate) {
  if constexpr (MR > 0) {
    if (rows == MR) {
      matmul_tile<E, MR, NV>(depth, a, a_row, a_col, b, b_row, c, c_row, accumulate);
    } else {
      matmul_rest<E, NV, MR - 1>(rows, depth, a, a_row, a_col, b, b_row, c, c_row, accumulate);
    }
  }
}

template <class E, int NV>
DIFFFAST_TARGET void matmul_panel(int64_t rows, int64_t depth, const E* a, int64_t a_row, int64_t a_col, const E* b,
                                  int64_t b_row, Sum<E>* c, int64_t c_row, bool accumulate) {
  constexpr int MR = tile_rows(NV);
  for (; rows >= MR; rows -= MR, a += MR * a_row, c += MR * c_row) {
    matmul_tile<E, MR, NV>(depth, a, a_row, a_col, b, b_row, c, c_row, accumulate);
  }
  matmul_rest<E, NV, MR - 1>(rows, depth, a, a_row, a_col, b, b_row, c, c_row, accumulate);
}

// C[rows, columns] = (accumulate ? C : 0) + A[rows, depth] B[depth, columns]; columns is a multiple of the lanes.
template <class E>
DIFFFAST_TARGET void matmul(int64_t rows, int64_t columns, int64_t depth, const E* a, int64_t a_row, int64_t a_col,
                            const E* b, int64_t b_row, Sum<E>* c, int64_t c_row, bool accumulate = false) {
  int64_t vectors = columns / lanes<Sum<E>>;
  int64_t panels = (vectors + kPanel - 1) / kPanel;
  for (; panels > 0; --panels) {
    const int64_t width = (vectors + panels - 1) / panels;
    switch (width) {
      case 1: matmul_panel<E, 1>(rows, depth, a, a_row, a_col, b, b_row, c, c_row, accumulate); break;
      case 2: matmul_panel<E, 2>(rows, depth, a, a_row, a_col, b, b_row, c, c_row, accumulate); break;
#if DIFFFAST_REGISTERS >= 32
      case 3: matmul_panel<E, 3>(rows, depth, a, a_row, a_col, b, b_row, c, c_row, accumulate); break;
      case 4: matmul_panel<E, 4>(rows, depth, a, a_row, a_col, b, b_row, c, c_row, accumulate); break;
      default: matmul_panel<E, 5>(rows, depth, a, a_row, a_col, b, b_row, c, c_row, accumulate);
#endif
    }
    b += width * lanes<Sum<E>>;
    c += width * lanes<Sum<E>>;
    vectors -= width;
  }
}
