// The gate of a feed-forward layer for one instruction set; included by geglu.cpp through every_set.h.

// z Phi(z), Phi being the normal distribution.  With a = |z| and the tail t = Phi(-a), it is z t below zero and z (1 - t)
// above.  t = exp(-a^2 / 2) R(a), where R is half of the scaled complementary error function of a / sqrt(2): smooth, and
// of nearly the shape of 1 / a.  R is a quotient of polynomials, fitted for the least largest relative error on
// 0 <= a <= 13.5, 5.2e-9; from there on t is below the smallest float.
DIFFFAST_INLINE Vec<float> gelu_of(Vec<float> z) {
  Vec<float> a = z < 0.0f ? -z : z;
  a = a > 13.5f ? broadcast(13.5f) : a;  // NaN stays
  Vec<float> p = broadcast(4.037002743620135e-3f);
  p = p * a + 4.009808128535869e-2f;
  p = p * a + 1.8164587998724596e-1f;
  p = p * a + 4.3614629135537486e-1f;
  p = p * a + 5.0000000256014219e-1f;
  Vec<float> q = broadcast(1.011912637965518e-2f);
  q = q * a + 1.0051819414361911e-1f;
  q = q * a + 4.6527535826452204e-1f;
  q = q * a + 1.1958963644539085f;
  q = q * a + 1.67017751216123f;
  q = q * a + 1.0f;
  const Vec<float> t = exp2_of(a * a * -0.72134752044448170f) * (p / q);  // log2(e) / 2
  return z * (z < 0.0f ? t : 1.0f - t);
}

DIFFFAST_INLINE Vec<double> gelu_of(Vec<double> z) {
  for (int i = 0; i < lanes<double>; ++i) z[i] *= std::erfc(z[i] * -0.70710678118654752440) / 2;
  return z;
}

template <class S>
DIFFFAST_INLINE void gate_vector(const S* value, const S* gate, S* out) {
  store_narrow(load_wide(value) * gelu_of(load_wide(gate)), out);
}

// The same for less than a vector.
template <class S>
DIFFFAST_TARGET void gate_rest(const S* value, const S* gate, S* out, int64_t count) {
  constexpr int kLanes = lanes<typename Compute<S>::type>;
  S values[kLanes] = {}, gates[kLanes] = {};
  std::copy(value, value + count, values);
  std::copy(gate, gate + count, gates);
  gate_vector(values, gates, values);
  std::copy(values, values + count, out);
}

template <class S>
DIFFFAST_TARGET void rows(const Geglu& p, int64_t begin, int64_t end) {
  constexpr int kLanes = lanes<typename Compute<S>::type>;
  for (int64_t row = begin; row < end; ++row) {
    const S *value = static_cast<const S*>(p.x) + row * 2 * p.channels, *gate = value + p.channels;
    S* out = static_cast<S*>(p.out) + row * p.channels;
    int64_t i = 0;
    for (; i + kLanes <= p.channels; i += kLanes) gate_vector(value + i, gate + i, out + i);
    if (i < p.channels) gate_rest(value + i, gate + i, out + i, p.channels - i);
  }
}
