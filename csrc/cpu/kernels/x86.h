// Operations on x86 with AVX2 or more that the vector types of GCC and Clang
// lack: access to a part of a vector, and the conversion of float16.
#pragma once

#include <immintrin.h>

#define RELU_MLP_MASKED_ACCESS
#define RELU_MLP_HAS_F16C
#include "vec.h"

namespace relu_mlp::cpu::RELU_MLP_ISA {
namespace {

#if RELU_MLP_VECTOR_BYTES == 64
RELU_MLP_INLINE Vec<float> load_some(const float* from, int64_t count) {
  return Vec<float>(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from));
}
RELU_MLP_INLINE Vec<double> load_some(const double* from, int64_t count) {
  return Vec<double>(_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), from));
}
RELU_MLP_INLINE void store_some(float* to, Vec<float> v, int64_t count) {
  _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), __m512(v));
}
RELU_MLP_INLINE void store_some(double* to, Vec<double> v, int64_t count) {
  _mm512_mask_storeu_pd(to, __mmask8((1u << count) - 1), __m512d(v));
}
#else
// A mask: all ones in the first `count` elements, 0 in the others.
RELU_MLP_INLINE __m256i first_floats(int64_t count) {
  return _mm256_cmpgt_epi32(
      _mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
RELU_MLP_INLINE __m256i first_doubles(int64_t count) {
  return _mm256_cmpgt_epi64(
      _mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
RELU_MLP_INLINE Vec<float> load_some(const float* from, int64_t count) {
  return Vec<float>(_mm256_maskload_ps(from, first_floats(count)));
}
RELU_MLP_INLINE Vec<double> load_some(const double* from, int64_t count) {
  return Vec<double>(_mm256_maskload_pd(from, first_doubles(count)));
}
RELU_MLP_INLINE void store_some(float* to, Vec<float> v, int64_t count) {
  _mm256_maskstore_ps(to, first_floats(count), __m256(v));
}
RELU_MLP_INLINE void store_some(double* to, Vec<double> v, int64_t count) {
  _mm256_maskstore_pd(to, first_doubles(count), __m256d(v));
}
#endif

inline void widen_half(float* to, const uint16_t* from, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(
        to + i,
        _mm256_cvtph_ps(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < count; ++i) {
    to[i] = _cvtsh_ss(from[i]);
  }
}

inline void round_to_half(uint16_t* to, const float* from, int64_t count) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(to + i),
        _mm256_cvtps_ph(_mm256_loadu_ps(from + i), nearest));
  }
  for (; i < count; ++i) {
    to[i] = _cvtss_sh(from[i], nearest);
  }
}

} // namespace
} // namespace relu_mlp::cpu::RELU_MLP_ISA
