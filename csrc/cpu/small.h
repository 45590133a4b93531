// The products of a layer for matrices so small that the set-up of a library
// call would cost more than the arithmetic. Plain loops that every compiler
// turns into vector code; no blocking, because all operands lie in the
// first-level cache; no threads.
//
// Every sum runs in a fixed order on one thread, so results do not depend on
// the number of threads.
#pragma once

#include <vector>

#include "../mlp.h"

namespace relu_mlp::cpu {

namespace detail {

// out(i, col ... col + width) = start(col ... col + width) + sum_s a(i, s)
// b(s, col ... col + width), with the sums in registers. `start` may be null.
template <int64_t width, typename T>
void product_columns(
    Matrix<T> out,
    Matrix<const T> a,
    Matrix<const T> b,
    const T* start,
    int64_t col) {
  for (int64_t i = 0; i < out.rows; ++i) {
    T sums[width] = {};
    if (start) {
      for (int64_t u = 0; u < width; ++u) {
        sums[u] = start[col + u];
      }
    }
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

} // namespace detail

// out (m, n) = start (n) + a (m, k) b (k, n). The rows of b and out are
// contiguous; a is read one element at a time and may have any strides, so a
// transposed matrix needs no copy. `start` is contiguous, or null for 0.
template <typename T>
void small_product(
    Matrix<T> out,
    Matrix<const T> a,
    Matrix<const T> b,
    const T* start = nullptr) {
  int64_t col = 0;
  for (; col + 16 <= out.cols; col += 16) {
    detail::product_columns<16>(out, a, b, start, col);
  }
  for (; col + 4 <= out.cols; col += 4) {
    detail::product_columns<4>(out, a, b, start, col);
  }
  switch (out.cols - col) {
    case 3:
      return detail::product_columns<3>(out, a, b, start, col);
    case 2:
      return detail::product_columns<2>(out, a, b, start, col);
    case 1:
      return detail::product_columns<1>(out, a, b, start, col);
  }
}

// out (rows, out_features) = a (rows, in_features) weight^T + bias, where
// weight is (out_features, in_features) and bias is contiguous or null. The
// rows of a, weight and out are contiguous.
template <typename T>
void small_linear(
    Matrix<T> out,
    Matrix<const T> a,
    Matrix<const T> weight,
    const T* bias) {
  if (out.rows >= 4) {
    // Enough rows to make a transposed copy of the weight pay.
    std::vector<T> copy(weight.rows * weight.cols);
    const Matrix<T> weight_t{
        copy.data(), weight.cols, weight.rows, weight.rows, 1};
    for (int64_t j = 0; j < weight.rows; ++j) {
      for (int64_t k = 0; k < weight.cols; ++k) {
        weight_t.row(k)[j] = weight.row(j)[k];
      }
    }
    return small_product<T>(
        out, a,
        {weight_t.data, weight_t.rows, weight_t.cols, weight_t.row_stride, 1},
        bias);
  }
  for (int64_t i = 0; i < out.rows; ++i) {
    for (int64_t j = 0; j < out.cols; ++j) {
      const T z = detail::dot(a.row(i), weight.row(j), a.cols);
      out.row(i)[j] = bias ? bias[j] + z : z;
    }
  }
}

} // namespace relu_mlp::cpu
