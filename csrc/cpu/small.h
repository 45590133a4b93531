// The three products of a layer for matrices so small that the set-up of a
// library call would cost more than the arithmetic. Plain loops that every
// compiler turns into vector code; no blocking, because all operands lie in
// the first-level cache; no threads.
//
// Layout: rows of a, weight and out are contiguous (col_stride 1). delta may
// have any strides: it is only ever read one element at a time.
//
// Every sum runs in index order on one thread, so results do not depend on
// the number of threads.
#pragma once

#include "../mlp.h"

namespace relu_mlp::cpu {

namespace detail {

// sum_k a[k] * b[k] with eight partial sums, which lets the compiler use
// vector registers without being allowed to reorder a single sum.
template <typename T>
T dot(const T* a, const T* b, int64_t n) {
  constexpr int64_t width = 8;
  T partial[width] = {};
  int64_t k = 0;
  for (; k + width <= n; k += width) {
    for (int64_t u = 0; u < width; ++u) {
      partial[u] += a[k + u] * b[k + u];
    }
  }
  T tail = 0;
  for (; k < n; ++k) {
    tail += a[k] * b[k];
  }
  for (int64_t half = width / 2; half > 0; half /= 2) {
    for (int64_t u = 0; u < half; ++u) {
      partial[u] += partial[u + half];
    }
  }
  return partial[0] + tail;
}

// y += alpha * x
template <typename T>
void axpy(T* y, T alpha, const T* x, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    y[k] += alpha * x[k];
  }
}

template <typename T>
void zero_row(T* row, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    row[k] = 0;
  }
}

} // namespace detail

// out (rows, out_features) = a (rows, in_features) weight^T + bias, where
// weight is (out_features, in_features) and bias may be null.
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

// out (out_features, in_features) = delta^T (out_features, rows) a (rows,
// in_features)
template <typename T>
void small_grad_weight(
    Matrix<T> out,
    Matrix<const T> delta,
    Matrix<const T> a) {
  for (int64_t j = 0; j < out.rows; ++j) {
    detail::zero_row(out.row(j), out.cols);
    for (int64_t i = 0; i < delta.rows; ++i) {
      detail::axpy(out.row(j), delta.at(i, j), a.row(i), out.cols);
    }
  }
}

// out (rows, in_features) = delta (rows, out_features) weight (out_features,
// in_features)
template <typename T>
void small_grad_input(
    Matrix<T> out,
    Matrix<const T> delta,
    Matrix<const T> weight) {
  for (int64_t i = 0; i < out.rows; ++i) {
    detail::zero_row(out.row(i), out.cols);
    for (int64_t j = 0; j < delta.cols; ++j) {
      detail::axpy(out.row(i), delta.at(i, j), weight.row(j), out.cols);
    }
  }
}

} // namespace relu_mlp::cpu
