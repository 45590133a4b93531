// The products of a layer for matrices so small that the set-up of a library
// call would cost more than the arithmetic. Plain loops that every compiler
// turns into vector code; no blocking, because all operands lie in the
// first-level cache; no threads.
//
// Every sum runs in a fixed order on one thread, so results do not depend on
// the number of threads.
#pragma once

#include "../mlp.h"

namespace relu_mlp::cpu {

namespace detail {

// sum_k a[k] * b[k]. Eight partial sums let the compiler use vector registers
// without being allowed to reorder a single sum.
template <typename T>
T dot(const T* a, const T* b, int64_t n) {
  constexpr int64_t width = 8;
  T sum = 0;
  int64_t k = 0;
  if (n >= width) {
    T partial[width] = {};
    for (; k + width <= n; k += width) {
      for (int64_t u = 0; u < width; ++u) {
        partial[u] += a[k + u] * b[k + u];
      }
    }
    for (int64_t half = width / 2; half > 0; half /= 2) {
      for (int64_t u = 0; u < half; ++u) {
        partial[u] += partial[u + half];
      }
    }
    sum = partial[0];
  }
  for (; k < n; ++k) {
    sum += a[k] * b[k];
  }
  return sum;
}

// out(i, col ... col + width) = sum_s a(i, s) b(s, col ... col + width), with
// the sums in registers.
template <int64_t width, typename T>
void product_columns(Matrix<T> out, Matrix<const T> a, Matrix<const T> b, int64_t col) {
  for (int64_t i = 0; i < out.rows; ++i) {
    T sums[width] = {};
    for (int64_t s = 0; s < a.cols; ++s) {
      const T factor = a.at(i, s);
      const T* const row = b.row(s) + col;
      for (int64_t u = 0; u < width; ++u) {
        sums[u] += factor * row[u];
      }
    }
    T* const to = out.row(i) + col;
    for (int64_t u = 0; u < width; ++u) {
      to[u] = sums[u];
    }
  }
}

} // namespace detail

// out (rows, out_features) = a (rows, in_features) weight^T + bias, where
// weight is (out_features, in_features) and bias may be null. The rows of a,
// weight and out are contiguous.
template <typename T>
void small_linear(
    Matrix<T> out,
    Matrix<const T> a,
    Matrix<const T> weight,
    const T* bias,
    int64_t bias_stride) {
  for (int64_t i = 0; i < out.rows; ++i) {
    for (int64_t j = 0; j < out.cols; ++j) {
      const T z = detail::dot(a.row(i), weight.row(j), a.cols);
      out.row(i)[j] = bias ? z + bias[j * bias_stride] : z;
    }
  }
}

// out (m, n) = a (m, k) b (k, n). The rows of b and out are contiguous; a is
// read one element at a time and may have any strides, so a transposed matrix
// needs no copy.
template <typename T>
void small_product(Matrix<T> out, Matrix<const T> a, Matrix<const T> b) {
  int64_t col = 0;
  for (; col + 16 <= out.cols; col += 16) {
    detail::product_columns<16>(out, a, b, col);
  }
  for (; col + 4 <= out.cols; col += 4) {
    detail::product_columns<4>(out, a, b, col);
  }
  switch (out.cols - col) {
    case 3:
      return detail::product_columns<3>(out, a, b, col);
    case 2:
      return detail::product_columns<2>(out, a, b, col);
    case 1:
      return detail::product_columns<1>(out, a, b, col);
  }
}

} // namespace relu_mlp::cpu
