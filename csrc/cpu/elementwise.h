// What the passes compute element by element: sums, masks, the derivative of
// the output activation.
#pragma once

#include <algorithm>

#include "convert.h"

namespace relu_mlp::cpu {

// Numbers of type T as compute_t<T>: the numbers themselves, or a copy at `to`.
template <typename T>
const compute_t<T>* computed(const T* from, compute_t<T>* to, int64_t count) {
  if constexpr (is_16bit<T>) {
    widen(to, from, count);
    return to;
  } else {
    return from;
  }
}

// out += addend. Both are contiguous.
template <typename C, typename A>
void add(Matrix<C> out, Matrix<const A> addend) {
  using F = compute_t<C>;
  constexpr int64_t max_piece = 512;
  F sums[max_piece], addends[max_piece];
  const int64_t count = out.rows * out.cols;
  for (int64_t i = 0; i < count; i += max_piece) {
    const int64_t piece = std::min(max_piece, count - i);
    C* const to = out.data + i;
    const F* const a = computed(to, sums, piece);
    const F* const b = computed(addend.data + i, addends, piece);
    if constexpr (is_16bit<C>) {
      for (int64_t k = 0; k < piece; ++k) {
        sums[k] += b[k];
      }
      round_to(to, sums, piece);
    } else {
      for (int64_t k = 0; k < piece; ++k) {
        to[k] = a[k] + b[k];
      }
    }
  }
}

// The sum of squares of `count` numbers. The compiler vectorizes it because its
// eight sums are independent.
template <typename C>
double sum_of_squares(const C* from, int64_t count) {
  constexpr int64_t together = 8;
  double sums[together] = {};
  for (int64_t i = 0; i < count; ++i) {
    sums[i % together] += double(from[i]) * double(from[i]);
  }
  double sum = 0;
  for (const double part : sums) {
    sum += part;
  }
  return sum;
}

// delta = delta where a > 0 or is NaN, else 0. Both are contiguous.
template <typename C>
void mask(Matrix<C> delta, Matrix<const C> a) {
  const int64_t count = delta.rows * delta.cols;
  if constexpr (is_16bit<C>) {
    kernels16<C>().mask(bits(delta.data), bits(a.data), count);
  } else {
    chosen_kernels<C>().mask(delta.data, a.data, count);
  }
}

// Every row of out = row. out is contiguous.
template <typename C, typename T>
void fill_rows(Matrix<C> out, const T* row) {
  for (int64_t i = 0; i < out.rows; ++i) {
    for (int64_t j = 0; j < out.cols; ++j) {
      out.row(i)[j] = C(compute_t<T>(row[j]));
    }
  }
}

// A loop for each activation makes a function large, so it is not copied into
// each of its callers.
#if defined(__GNUC__)
#define RELU_MLP_NOINLINE __attribute__((noinline))
#else
#define RELU_MLP_NOINLINE
#endif

// delta = grad_output * phi'(z). delta is contiguous, and so are the rows of y,
// which may be missing if phi is the identity. grad_output may have any
// strides.
template <typename D, typename T, typename C>
RELU_MLP_NOINLINE void activation_backward(
    Activation activation,
    Matrix<D> delta,
    Matrix<const T> grad_output,
    Matrix<const C> y) {
  using F = compute_t<C>;
  const bool has_y = activation != Activation::none;
  with_row(activation, [&]<typename Row>() {
    for (int64_t i = 0; i < delta.rows; ++i) {
      for (int64_t j = 0; j < delta.cols; ++j) {
        const F output = has_y ? F(y.row(i)[j]) : F(0);
        delta.row(i)[j] = D(Row::backward(F(grad_output.at(i, j)), output));
      }
    }
  });
}

// of_y = grad_output * change * d phi'(z) / d y, for a phi that has a curvature.
// of_y and change are contiguous, and so are the rows of y. grad_output may
// have any strides.
template <typename T, typename C>
RELU_MLP_NOINLINE void activation_curvature(
    Activation activation,
    Matrix<T> of_y,
    Matrix<const T> grad_output,
    Matrix<const C> change,
    Matrix<const C> y) {
  using F = compute_t<C>;
  with_row(activation, [&]<typename Row>() {
    if constexpr (Row::has_curvature) {
      for (int64_t i = 0; i < of_y.rows; ++i) {
        for (int64_t j = 0; j < of_y.cols; ++j) {
          of_y.row(i)[j] =
              T(F(grad_output.at(i, j)) * F(change.row(i)[j]) *
                Row::curvature(F(y.row(i)[j])));
        }
      }
    }
  });
}

} // namespace relu_mlp::cpu
