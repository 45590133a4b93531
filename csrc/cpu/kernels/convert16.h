// Kernels for the 16-bit formats: conversions to and from float, ReLU and its
// mask, sums of columns. Memory limits them all. They are loops over bits,
// which the compiler turns into vector code. The including file may define
// RELU_MLP_HAS_F16C where the processor converts float16 itself (x86.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "../../mlp.h"

namespace relu_mlp::cpu::RELU_MLP_ISA {
namespace {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// bfloat16 is the upper half of a float.
void widen_bfloat16(float* to, const uint16_t* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = from_bits(uint32_t(from[i]) << 16);
  }
}

void round_to_bfloat16(uint16_t* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = to_bits(from[i]);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    to[i] = uint16_t(is_nan ? 0x7fc0 : rounded);
  }
}

#if !defined(RELU_MLP_HAS_F16C)
// From M. Dukhan's FP16 library, like PyTorch's own conversion: a
// multiplication moves the exponent, which is also right for subnormal numbers.
void widen_half(float* to, const uint16_t* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t w = uint32_t(from[i]) << 16, sign = w & 0x80000000;
    const uint32_t twice = w + w;
    const float normal =
        from_bits((twice >> 4) + (0xe0u << 23)) * from_bits(0x07800000);
    const float subnormal = from_bits((twice >> 17) | (126u << 23)) - 0.5f;
    to[i] = from_bits(sign | to_bits(twice < (1u << 27) ? subnormal : normal));
  }
}

void round_to_half(uint16_t* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t w = to_bits(from[i]), twice = w + w, sign = w & 0x80000000;
    const float magnitude = from_bits(w & 0x7fffffff);
    // Adding a number this large rounds to the precision of float16.
    float base = (magnitude * from_bits(0x77800000)) * from_bits(0x08800000);
    uint32_t bias = twice & 0xff000000;
    bias = bias < 0x71000000 ? 0x71000000 : bias;
    base = from_bits((bias >> 1) + 0x07800000) + base;
    const uint32_t bits = to_bits(base);
    const uint32_t number = (bits >> 13 & 0x7c00) + (bits & 0x0fff);
    to[i] = uint16_t((sign >> 16) | (twice > 0xff000000 ? 0x7e00 : number));
  }
}
#endif

// Whether the number is 0 or negative, and not NaN. `infinity` has the bits of
// the format's infinity.
template <uint16_t infinity>
inline bool is_off(uint16_t bits) {
  const uint16_t magnitude = bits & 0x7fff;
  return magnitude == 0 || (bits > 0x7fff && magnitude <= infinity);
}

template <uint16_t infinity>
void relu(uint16_t* z, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    z[i] = is_off<infinity>(z[i]) ? 0 : z[i];
  }
}

template <uint16_t infinity>
void mask(uint16_t* delta, const uint16_t* a, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    delta[i] = is_off<infinity>(a[i]) ? 0 : delta[i];
  }
}

// Sums 32 rows at a time in float, and adds these sums in double precision.
template <void (*widen)(float*, const uint16_t*, int64_t)>
void column_sums_16bit(double* sums, Matrix<const uint16_t> m) {
  constexpr int64_t most_cols = 64, most_rows = 32;
  for (int64_t first = 0; first < m.rows; first += most_rows) {
    const int64_t end = first + most_rows < m.rows ? first + most_rows : m.rows;
    float part[most_cols] = {}, row[most_cols];
    for (int64_t i = first; i < end; ++i) {
      widen(row, m.row(i), m.cols);
      for (int64_t j = 0; j < m.cols; ++j) {
        part[j] += row[j];
      }
    }
    for (int64_t j = 0; j < m.cols; ++j) {
      sums[j] += double(part[j]);
    }
  }
}

} // namespace
} // namespace relu_mlp::cpu::RELU_MLP_ISA
