// What happens between the last product and the first of the way back: the
// derivative of the output activation, and that of the loss.
#pragma once

#include <algorithm>

#include "convert.h"

namespace relu_mlp::cpu {

// grad * phi'(z), with phi' written in terms of y = phi(z). The order of the
// factors is PyTorch's, so that 0 * inf turns up in the same places.
template <Activation phi, typename C>
C times_derivative(C grad, C y) {
  if constexpr (phi == Activation::relu) {
    return y <= C(0) ? C(0) : grad;
  } else if constexpr (phi == Activation::sigmoid) {
    return grad * (C(1) - y) * y;
  } else if constexpr (phi == Activation::tanh) {
    return grad * (C(1) - y * y);
  } else {
    return grad;
  }
}

// Calls f<phi>() for an activation known only at run time.
template <typename F>
void dispatch(Activation phi, const F& f) {
  switch (phi) {
    case Activation::none:
      return f.template operator()<Activation::none>();
    case Activation::relu:
      return f.template operator()<Activation::relu>();
    case Activation::sigmoid:
      return f.template operator()<Activation::sigmoid>();
    case Activation::tanh:
      return f.template operator()<Activation::tanh>();
  }
}

// delta = grad_output * phi'(z). delta and y are contiguous, y may be missing
// where phi is the identity, and grad_output has any strides.
template <typename C, typename T>
void activation_backward(
    Activation activation,
    Matrix<C> delta,
    Matrix<const T> grad_output,
    Matrix<const C> y) {
  using F = compute_t<C>;
  dispatch(activation, [&]<Activation phi>() {
    for (int64_t i = 0; i < delta.rows; ++i) {
      for (int64_t j = 0; j < delta.cols; ++j) {
        const F output = phi == Activation::none ? F(0) : F(y.row(i)[j]);
        delta.row(i)[j] =
            C(times_derivative<phi>(F(grad_output.at(i, j)), output));
      }
    }
  });
}

// squared_error for an activation known when this is compiled. Eight sums that do
// not wait for each other make it vector code.
template <Activation phi, typename C, typename T>
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
      delta[i + u] =
          C(times_derivative<phi>(F(scale) * error[u], output[u]));
    }
  }
  for (; i < count; ++i) {
    const F output = F(y[i]), error = output - F(target[i]);
    sums[0] += double(error) * double(error);
    delta[i] = C(times_derivative<phi>(F(scale) * error, output));
  }
  double sum = 0;
  for (const double part : sums) {
    sum += part;
  }
  return sum;
}

// The same for numbers of 16 bits, which are widened piece by piece.
template <Activation phi, typename T>
double squared_error_through(
    T* delta,
    const T* y,
    const T* target,
    int64_t count,
    double scale)
  requires(sizeof(T) == 2)
{
  constexpr int64_t most = 512;
  float delta_of[most], y_of[most], target_of[most];
  double sum = 0;
  for (int64_t i = 0; i < count; i += most) {
    const int64_t piece = std::min(most, count - i);
    widen(y_of, y + i, piece);
    widen(target_of, target + i, piece);
    sum += squared_error_through<phi>(delta_of, y_of, target_of, piece, scale);
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
  dispatch(activation, [&]<Activation phi>() {
    sum = squared_error_through<phi>(
        delta.data, y.data, target.data, delta.rows * delta.cols, scale);
  });
  return sum;
}

} // namespace relu_mlp::cpu
