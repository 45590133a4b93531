// The first delta of a backward pass, element by element: the gradient of y or
// of the loss, times the derivative of the output activation.
#pragma once

#include <algorithm>

#include "convert.h"

namespace relu_mlp::cpu {

// delta = grad_output * phi'(z). delta and y are contiguous. y may be missing
// if phi is the identity. grad_output may have any strides.
template <typename C, typename T>
void activation_backward(
    Activation activation,
    Matrix<C> delta,
    Matrix<const T> grad_output,
    Matrix<const C> y) {
  using F = compute_t<C>;
  const bool has_y = activation != Activation::none;
  with_row(activation, [&]<typename Row>() {
    for (int64_t i = 0; i < delta.rows; ++i) {
      for (int64_t j = 0; j < delta.cols; ++j) {
        const F output = has_y ? F(y.row(i)[j]) : F(0);
        delta.row(i)[j] = C(Row::backward(F(grad_output.at(i, j)), output));
      }
    }
  });
}

// squared_error for one row of the table of activations. The compiler
// vectorizes it because its eight sums are independent.
template <typename Row, typename C, typename T>
double squared_error_through(
    C* delta,
    const C* y,
    const T* target,
    int64_t count,
    double scale) {
  using F = compute_t<C>;
  constexpr int64_t together = 8;
  double sums[together] = {};
  int64_t i = 0;
  for (; i + together <= count; i += together) {
    F output[together], error[together];
    for (int64_t u = 0; u < together; ++u) {
      output[u] = F(y[i + u]);
      error[u] = output[u] - F(target[i + u]);
    }
    for (int64_t u = 0; u < together; ++u) {
      sums[u] += double(error[u]) * double(error[u]);
    }
    for (int64_t u = 0; u < together; ++u) {
      delta[i + u] = C(Row::backward(F(scale) * error[u], output[u]));
    }
  }
  for (; i < count; ++i) {
    const F output = F(y[i]), error = output - F(target[i]);
    sums[0] += double(error) * double(error);
    delta[i] = C(Row::backward(F(scale) * error, output));
  }
  double sum = 0;
  for (const double part : sums) {
    sum += part;
  }
  return sum;
}

// The same for elements of 16 bits. They are converted to float piece by piece.
template <typename Row, typename T>
double squared_error_through(
    T* delta,
    const T* y,
    const T* target,
    int64_t count,
    double scale)
  requires(sizeof(T) == 2)
{
  constexpr int64_t max_piece = 512;
  float delta_of[max_piece], y_of[max_piece], target_of[max_piece];
  double sum = 0;
  for (int64_t i = 0; i < count; i += max_piece) {
    const int64_t piece = std::min(max_piece, count - i);
    widen(y_of, y + i, piece);
    widen(target_of, target + i, piece);
    sum += squared_error_through<Row>(delta_of, y_of, target_of, piece, scale);
    round_to(delta + i, delta_of, piece);
  }
  return sum;
}

// delta = scale * (y - target) * phi'(z), the gradient of the loss at z.
// Returns the sum of (y - target)^2. All are contiguous.
template <typename C, typename T>
double squared_error(
    Activation activation,
    Matrix<C> delta,
    Matrix<const C> y,
    Matrix<const T> target,
    double scale) {
  double sum = 0;
  with_row(activation, [&]<typename Row>() {
    sum = squared_error_through<Row>(
        delta.data, y.data, target.data, delta.rows * delta.cols, scale);
  });
  return sum;
}

} // namespace relu_mlp::cpu
