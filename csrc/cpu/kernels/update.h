// The updates of parameters by an optimizer, element by element, in the order
// of operations of torch.optim without `foreach` and `fused`.
//
// Square roots and divisions limit the speed of Adam while its four arrays are
// in the cache, then the bandwidth to memory.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"
#include "vec.h"

namespace relu_mlp::cpu::RELU_MLP_ISA {
namespace {

// v, as the result of an operation of its own: the compiler must not turn a
// product and a later sum into one instruction. PyTorch rounds in between.
template <typename V>
RELU_MLP_INLINE V rounded(V v) {
#if defined(__GNUC__) && defined(__SSE2__)
#if RELU_MLP_VECTOR_BYTES == 64
  asm("" : "+v"(v));
#else
  asm("" : "+x"(v));
#endif
#elif defined(__GNUC__) && defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

#if defined(__GNUC__) && defined(__SSE2__)
#if RELU_MLP_VECTOR_BYTES == 64
// With a mask of all lanes, because GCC 12 warns about the others' definition.
RELU_MLP_INLINE Vec<float> root(Vec<float> v) {
  return Vec<float>(_mm512_maskz_sqrt_ps(__mmask16(-1), __m512(v)));
}
RELU_MLP_INLINE Vec<double> root(Vec<double> v) {
  return Vec<double>(_mm512_maskz_sqrt_pd(__mmask8(-1), __m512d(v)));
}
#elif RELU_MLP_VECTOR_BYTES == 32
RELU_MLP_INLINE Vec<float> root(Vec<float> v) {
  return Vec<float>(_mm256_sqrt_ps(__m256(v)));
}
RELU_MLP_INLINE Vec<double> root(Vec<double> v) {
  return Vec<double>(_mm256_sqrt_pd(__m256d(v)));
}
#else
RELU_MLP_INLINE Vec<float> root(Vec<float> v) {
  return Vec<float>(_mm_sqrt_ps(__m128(v)));
}
RELU_MLP_INLINE Vec<double> root(Vec<double> v) {
  return Vec<double>(_mm_sqrt_pd(__m128d(v)));
}
#endif
#elif defined(__GNUC__) && defined(__aarch64__)
RELU_MLP_INLINE Vec<float> root(Vec<float> v) {
  return Vec<float>(vsqrtq_f32(float32x4_t(v)));
}
RELU_MLP_INLINE Vec<double> root(Vec<double> v) {
  return Vec<double>(vsqrtq_f64(float64x2_t(v)));
}
#else
template <typename C>
RELU_MLP_INLINE Vec<C> root_of(Vec<C> v) {
  C lanes_of[lanes<C>];
  store(lanes_of, v);
  for (C& lane : lanes_of) {
    lane = C(__builtin_sqrt(lane));
  }
  return load(lanes_of);
}
RELU_MLP_INLINE Vec<float> root(Vec<float> v) {
  return root_of<float>(v);
}
RELU_MLP_INLINE Vec<double> root(Vec<double> v) {
  return root_of<double>(v);
}
#endif

// Whether every lane is finite, if v is the sum of 0 times what was read.
template <typename C>
bool is_all_zero(Vec<C> v) {
  C lanes_of[lanes<C>];
  store(lanes_of, v);
  for (const C lane : lanes_of) {
    if (lane != 0) {
      return false;
    }
  }
  return true;
}

// While an object of this class lives, subnormal numbers are 0 in vectors of
// this thread, read or written. Arithmetic with them takes a hundred times as
// long on some processors.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  explicit FlushSubnormals(bool flushes) : before_(_mm_getcsr()) {
    constexpr unsigned flush_results = 0x8000, flush_operands = 0x0040;
    if (flushes) {
      _mm_setcsr(before_ | flush_results | flush_operands);
    }
  }
  ~FlushSubnormals() {
    _mm_setcsr(before_);
  }

 private:
  const unsigned before_;
#else
  explicit FlushSubnormals(bool) {}
#endif
};

// Calls step(load_from, store_to, i) for vectors of elements that cover
// [0, count). Both take a pointer to the first element of an array.
template <typename C, typename Step>
RELU_MLP_INLINE void for_each_vector(int64_t count, const Step& step) {
  constexpr int64_t W = lanes<C>;
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    step(
        [i](const C* from) { return load(from + i); },
        [i](C* to, Vec<C> v) { store(to + i, v); });
  }
  if (const int64_t rest = count - i) {
    step(
        [i, rest](const C* from) { return load_some(from + i, rest); },
        [i, rest](C* to, Vec<C> v) { store_some(to + i, v, rest); });
  }
}

// See SgdArgs in kernels.h.
template <typename C>
bool sgd(const SgdArgs<C>& args) {
  const SgdArgs<C> a = args; // a copy, which the stores below can't change
  Vec<C> not_finite{};
  for_each_vector<C>(a.count, [&](const auto& from, const auto& to) {
    const Vec<C> p = from(a.parameter), given = from(a.gradient);
    not_finite += given * C(0);
    Vec<C> g = rounded(given * a.gradient_factor);
    if (a.weight_decay != 0) {
      g = rounded(g + p * a.weight_decay);
    }
    if (a.buffer) {
      const Vec<C> decayed = rounded(from(a.buffer) * a.momentum);
      const Vec<C> buffer = rounded(decayed + g * a.undampened);
      to(a.buffer, buffer);
      g = a.nesterov ? rounded(g + buffer * a.momentum) : buffer;
    }
    to(a.parameter, p + g * -a.lr);
  });
  return is_all_zero<C>(not_finite);
}

// See AdamArgs in kernels.h.
//
// The running means of a unit that gets no more gradients decay until they are
// subnormal, and stay there. Beside this much `eps` such numbers are lost in
// rounding: their square roots are at most 1e-19 times root_factor.
template <typename C>
bool adam(const AdamArgs<C>& args) {
  const AdamArgs<C> a = args; // a copy, which the stores below can't change
  constexpr C enough_eps = C(1e-10);
  const FlushSubnormals flush(a.eps >= enough_eps);
  Vec<C> not_finite{};
  for_each_vector<C>(a.count, [&](const auto& from, const auto& to) {
    Vec<C> p = from(a.parameter);
    const Vec<C> given = from(a.gradient);
    not_finite += given * C(0);
    Vec<C> g = rounded(given * a.gradient_factor);
    if (a.weight_decay != 0) {
      g = rounded(g + p * a.weight_decay);
    }
    p = rounded(p * a.parameter_factor);
    Vec<C> mean = from(a.mean);
    mean = a.weight < C(0.5) ? mean + (g - mean) * a.weight
                             : g - (g - mean) * (C(1) - a.weight);
    to(a.mean, mean);
    const Vec<C> decayed = rounded(from(a.square) * a.beta2);
    Vec<C> square = decayed + rounded(g * a.weight_of_square) * g;
    to(a.square, square);
    if (a.max_square) {
      // As torch.maximum: NaN if either is NaN.
      const Vec<C> before = from(a.max_square);
      square = before > square || before != before ? before : square;
      to(a.max_square, square);
    }
    const Vec<C> divisor = rounded(root(square) * a.root_factor) + a.eps;
    to(a.parameter, p - mean * a.step_size / divisor);
  });
  return is_all_zero<C>(not_finite);
}

} // namespace
} // namespace relu_mlp::cpu::RELU_MLP_ISA
