// Conversions between T, the type in which numbers are stored, and
// compute_t<T>, the type in which this package's products compute: T itself for
// float and double, float for bfloat16 and float16.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "../arithmetic.h"
#include "../mlp.h"
#include "isa/isa.h"

namespace relu_mlp::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <typename T>
constexpr bool is_16bit = !std::is_same_v<T, compute_t<T>>;

// The kernels for T, BFloat16 or Half.
template <typename T>
const Kernels16& kernels16() {
  const InstructionSet& isa = chosen_instruction_set();
  return std::is_same_v<T, BFloat16> ? isa.bfloat16 : isa.half;
}

// 16-bit numbers as their bits.
template <typename T>
uint16_t* bits(T* numbers) {
  return reinterpret_cast<uint16_t*>(numbers);
}
template <typename T>
const uint16_t* bits(const T* numbers) {
  return reinterpret_cast<const uint16_t*>(numbers);
}
template <typename T>
Matrix<const uint16_t> bits(Matrix<const T> m) {
  return {bits(m.data), m.rows, m.cols, m.row_stride, m.col_stride};
}

// Convert `count` numbers. Rounding is to the nearest, ties to even.
template <typename T>
void widen(float* to, const T* from, int64_t count) {
  kernels16<T>().widen(to, bits(from), count);
}
template <typename T>
void round_to(T* to, const float* from, int64_t count) {
  kernels16<T>().round(bits(to), from, count);
}

// How many elements `widened` needs at `to` for `count` elements of m.
template <typename T>
int64_t widened_size(int64_t count) {
  return is_16bit<T> ? count : 0;
}

// m as compute_t<T>: m itself, or a contiguous copy at `to`. The rows of m are
// contiguous.
template <typename T>
Matrix<const compute_t<T>> widened(Matrix<const T> m, compute_t<T>* to) {
  if constexpr (!is_16bit<T>) {
    return m;
  } else {
    if (m.row_stride == m.cols) {
      widen(to, m.data, m.rows * m.cols);
    } else {
      for (int64_t i = 0; i < m.rows; ++i) {
        widen(to + i * m.cols, m.row(i), m.cols);
      }
    }
    return {to, m.rows, m.cols, m.cols, 1};
  }
}

} // namespace relu_mlp::cpu
