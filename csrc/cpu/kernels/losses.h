// Kernels for losses: the softmax of rows, and losses that are a sum over
// elements.
//
// The exponential limits the speed of those that have one: about 15
// instructions for a vector, or the bandwidth of the cache if a row is wide.
// All exponents are at most 0, so nothing overflows.
#pragma once

#include <cstring>
#include <limits>

#include "../../mlp.h"
#include "vec.h"

namespace relu_mlp::cpu::RELU_MLP_ISA {
namespace {

// Unsigned integers as wide as C, and vectors of them.
template <typename C>
struct Integers;
template <>
struct Integers<float> {
  using Int = uint32_t;
};
template <>
struct Integers<double> {
  using Int = uint64_t;
};
#if defined(__GNUC__)
template <typename C>
struct IntegerVec {
  typedef typename Integers<C>::Int Vec
      __attribute__((vector_size(RELU_MLP_VECTOR_BYTES)));
};
#else
template <typename C>
struct IntegerVec {
  using Vec = typename Integers<C>::Int;
};
#endif

// The same bits as another type.
template <typename To, typename From>
RELU_MLP_INLINE To as_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// The constants of exp and log1p. The polynomials interpolate at Chebyshev's
// nodes: P(r) = (e^r - 1 - r) / r^2 for |r| <= log(2) / 2, and
// Q(z) = (atanh(sqrt z) / sqrt z - 1) / z for 0 <= z <= 1/9. Both are accurate
// to a fraction of a rounding. log2_high has so few digits that its product
// with any exponent is exact.
template <typename C>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float lowest = -104; // e^x rounds to 0 below
  static constexpr int mantissa_bits = 23, exponent_bias = 127;
  static constexpr float to_integer = 0x1.8p23f; // adding it rounds
  static constexpr float log2_e = 0x1.715476p0f;
  static constexpr float log2_high = 0x1.62e4p-1f;
  static constexpr float log2_low = 1.42860682031e-6f;
  static constexpr float p[] = {
      0.5f, 0.1666657699f, 0.04166655462f, 0.008363179053f, 0.001392618359f};
  static constexpr float q[] = {
      0.3333333366f, 0.1999985317f, 0.14296179f, 0.108532879f, 0.1161216461f};
};

template <>
struct Constants<double> {
  static constexpr double lowest = -746;
  static constexpr int mantissa_bits = 52, exponent_bias = 1023;
  static constexpr double to_integer = 0x1.8p52;
  static constexpr double log2_e = 0x1.71547652b82fep0;
  static constexpr double log2_high = 0x1.62e42fefp-1;
  static constexpr double log2_low = 7.4406171100123967161e-11;
  static constexpr double p[] = {
      0.5,
      0.1666666666666667099,
      0.04166666666666666975,
      0.008333333333326135126,
      0.00138888888888837483,
      0.0001984126987482062527,
      0.00002480158732554774122,
      2.755725540020642443e-6,
      2.755727364311029533e-7,
      2.510521700472074516e-8,
      2.091468696808687723e-9};
  static constexpr double q[] = {
      0.3333333333333333344,  0.1999999999999976125,  0.1428571428580004965,
      0.1111111109911838528,  0.09090909948981357191, 0.07692271982430274643,
      0.06667589315724627918, 0.0586713953065159873,  0.05422589197440007411,
      0.0374607189777538365,  0.07815288900461425223};
};

// coefficients[0] + coefficients[1] x + ..., by Horner's rule.
template <typename C, int count>
RELU_MLP_INLINE Vec<C> polynomial(const C (&coefficients)[count], Vec<C> x) {
  Vec<C> sum = broadcast(coefficients[count - 1]);
  RELU_MLP_UNROLL
  for (int k = count - 2; k >= 0; --k) {
    sum = sum * x + broadcast(coefficients[k]);
  }
  return sum;
}

// e^x for x <= 0, accurate to 2 units in the last place, also where it is
// subnormal. NaN stays NaN.
//
// With x = n log(2) + r, e^x = 2^n e^r. The factor 2^n may be too small for a
// normal number, so it is applied as two factors. Only the second product
// rounds.
template <typename C>
RELU_MLP_INLINE Vec<C> exp_of(Vec<C> x) {
  using K = Constants<C>;
  using Int = typename Integers<C>::Int;
  using IntVec = typename IntegerVec<C>::Vec;
  constexpr int m = K::mantissa_bits;
  const Vec<C> lowest = broadcast(K::lowest);
  x = x < lowest ? lowest : x;
  const Vec<C> shifted = x * K::log2_e + K::to_integer;
  const Vec<C> n = shifted - K::to_integer;
  const Vec<C> r = (x - n * K::log2_high) - n * K::log2_low;
  const Vec<C> power = (r * r) * polynomial<C>(K::p, r) + r + C(1);
  // n + even, which is positive, so the shifts need no sign.
  constexpr Int even = 1 << (sizeof(C) == 4 ? 9 : 12);
  const IntVec positive =
      as_bits<IntVec>(shifted) - (as_bits<Int>(K::to_integer) - even);
  const IntVec half = positive >> 1, rest = positive - half;
  constexpr Int bias = K::exponent_bias - even / 2;
  return power * as_bits<Vec<C>>((half + bias) << m) *
      as_bits<Vec<C>>((rest + bias) << m);
}

// log(1 + e) for 0 <= e <= 1, as 2 atanh(e / (2 + e)).
template <typename C>
RELU_MLP_INLINE Vec<C> log1p_of(Vec<C> e) {
  const Vec<C> s = e / (e + C(2)), z = s * s;
  return C(2) * (s + s * z * polynomial<C>(Constants<C>::q, z));
}

// The elements of v below `count`; `other` in the others.
template <typename C>
RELU_MLP_INLINE Vec<C> first_of(Vec<C> v, int64_t count, C other) {
  C index[lanes<C>];
  RELU_MLP_UNROLL
  for (int64_t i = 0; i < lanes<C>; ++i) {
    index[i] = C(i);
  }
  return load(index) < broadcast(C(count)) ? v : broadcast(other);
}

template <typename C>
RELU_MLP_INLINE Vec<C> larger(Vec<C> a, Vec<C> b) {
  return a > b ? a : b;
}

// The result of a and b combined over the lanes of v.
template <typename C, typename F>
RELU_MLP_INLINE C over_lanes(Vec<C> v, const F& combine) {
  C lane[lanes<C>];
  store(lane, v);
  RELU_MLP_UNROLL
  for (int64_t half = lanes<C> / 2; half > 0; half /= 2) {
    RELU_MLP_UNROLL
    for (int64_t i = 0; i < half; ++i) {
      lane[i] = combine(lane[i], lane[i + half]);
    }
  }
  return lane[0];
}

template <typename C>
RELU_MLP_INLINE C largest_of(Vec<C> v) {
  return over_lanes<C>(v, [](C a, C b) { return a > b ? a : b; });
}
template <typename C>
RELU_MLP_INLINE C sum_of(Vec<C> v) {
  return over_lanes<C>(v, [](C a, C b) { return a + b; });
}

// The largest element; NaN does not count. -infinity without an element.
template <typename C>
RELU_MLP_INLINE C largest_in(const C* from, int64_t count) {
  constexpr int64_t W = lanes<C>;
  constexpr C none = -std::numeric_limits<C>::infinity();
  Vec<C> most[4];
  for (Vec<C>& v : most) {
    v = broadcast(none);
  }
  int64_t j = 0;
  for (; j + 4 * W <= count; j += 4 * W) {
    RELU_MLP_UNROLL
    for (int u = 0; u < 4; ++u) {
      most[u] = larger<C>(load(from + j + u * W), most[u]);
    }
  }
  for (; j + W <= count; j += W) {
    most[0] = larger<C>(load(from + j), most[0]);
  }
  if (j < count) {
    const Vec<C> last = load_some(from + j, count - j);
    most[0] = larger<C>(first_of<C>(last, count - j, none), most[0]);
  }
  return largest_of<C>(
      larger<C>(larger<C>(most[0], most[1]), larger<C>(most[2], most[3])));
}

// to = e^(from - shift). Returns the sum. `to` may be `from`.
template <typename C>
RELU_MLP_INLINE double exps_of(C* to, const C* from, int64_t count, C shift) {
  constexpr int64_t W = lanes<C>, piece = 256 * W;
  const Vec<C> largest = broadcast(shift);
  double total = 0;
  for (int64_t first = 0; first < count; first += piece) {
    const int64_t end = count - first < piece ? count : first + piece;
    Vec<C> sums[2] = {};
    int64_t j = first;
    for (; j + 2 * W <= end; j += 2 * W) {
      RELU_MLP_UNROLL
      for (int u = 0; u < 2; ++u) {
        const Vec<C> e = exp_of<C>(load(from + j + u * W) - largest);
        store(to + j + u * W, e);
        sums[u] += e;
      }
    }
    if (j + W <= end) {
      const Vec<C> e = exp_of<C>(load(from + j) - largest);
      store(to + j, e);
      sums[0] += e;
      j += W;
    }
    if (j < end) {
      const Vec<C> e = exp_of<C>(load_some(from + j, end - j) - largest);
      store_some(to + j, e, end - j);
      sums[1] += first_of<C>(e, end - j, C(0));
    }
    total += double(sum_of<C>(sums[0] + sums[1]));
  }
  return total;
}

template <typename C>
void softmax(Matrix<C> exps, Matrix<const C> y, C* largest, double* sums) {
  for (int64_t i = 0; i < y.rows; ++i) {
    largest[i] = largest_in(y.row(i), y.cols);
    sums[i] = exps_of(exps.row(i), y.row(i), y.cols, largest[i]);
  }
}

// A loss of elements y and their targets: its value, and its slope, the
// derivative at y.
template <typename C>
struct ValueAndSlope {
  Vec<C> value, slope;
};

// |y - target|. The slope is 0 for NaN too, as in PyTorch.
struct AbsoluteError {
  template <typename C>
  RELU_MLP_INLINE static ValueAndSlope<C> at(Vec<C> y, Vec<C> target) {
    const Vec<C> e = y - target, zero{}, one = zero + C(1);
    return {e < zero ? -e : e, e > zero ? one : (e < zero ? -one : zero)};
  }
};

// e^2 / 2 where |e| < 1, else |e| - 1/2, with e = y - target. If m is
// min(|e|, 1), both are m (|e| - m / 2).
struct HuberError {
  template <typename C>
  RELU_MLP_INLINE static ValueAndSlope<C> at(Vec<C> y, Vec<C> target) {
    const Vec<C> e = y - target, zero{}, one = zero + C(1);
    const Vec<C> size = e < zero ? -e : e, m = size < one ? size : one;
    return {m * (size - C(0.5) * m), e > one ? one : (e < -one ? -one : e)};
  }
};

// -target log(p) - (1 - target) log(1 - p) with p = sigmoid(y). With
// e = exp(-|y|), p is 1 / (1 + e), or e / (1 + e) if y < 0, and -log(p) is
// log(1 + e) - min(y, 0).
struct BinaryCrossEntropy {
  template <typename C>
  RELU_MLP_INLINE static ValueAndSlope<C> at(Vec<C> y, Vec<C> target) {
    const Vec<C> zero{}, one = zero + C(1);
    const Vec<C> below = y < zero ? y : zero; // 0 if y is NaN
    const Vec<C> e = exp_of<C>(y < zero ? y : -y);
    const Vec<C> p = (y < zero ? e : one) / (e + one);
    return {(one - target) * y - below + log1p_of<C>(e), p - target};
  }
};

template <typename Loss, typename C>
double element_loss(
    C* gradient,
    const C* y,
    const C* target,
    int64_t count,
    C scale) {
  constexpr int64_t W = lanes<C>;
  double totals[W] = {};
  const auto add = [&](Vec<C> values, int64_t present) {
    C value[W];
    store(value, values);
    for (int64_t j = 0; j < W; ++j) {
      totals[j] += j < present ? double(value[j]) : 0;
    }
  };
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    const auto at = Loss::template at<C>(load(y + i), load(target + i));
    store(gradient + i, Vec<C>(at.slope * scale));
    add(at.value, W);
  }
  if (const int64_t rest = count - i) {
    const auto at = Loss::template at<C>(
        load_some(y + i, rest), load_some(target + i, rest));
    store_some(gradient + i, Vec<C>(at.slope * scale), rest);
    add(at.value, rest);
  }
  double total = 0;
  for (const double part : totals) {
    total += part;
  }
  return total;
}

} // namespace
} // namespace relu_mlp::cpu::RELU_MLP_ISA
