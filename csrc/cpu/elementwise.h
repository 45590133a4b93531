// What happens between the last product and the first of the way back: the
// derivative of the output activation, and that of the loss.
#pragma once

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

// delta = scale * (y - target) * phi'(z), the gradient of the loss at z.
// Returns the sum of (y - target)^2. All are contiguous.
template <typename C, typename T>
double squared_error(
    Activation activation,
    Matrix<C> delta,
    Matrix<const C> y,
    Matrix<const T> target,
    double scale) {
  using F = compute_t<C>;
  // Sums that do not wait for each other, which makes this vector code.
  constexpr int64_t together = 8;
  double sums[together] = {};
  dispatch(activation, [&]<Activation phi>() {
    const auto element = [&](int64_t i, int64_t sum) {
      const F output = F(y.data[i]), error = output - F(target.data[i]);
      sums[sum] += double(error) * double(error);
      delta.data[i] = C(times_derivative<phi>(F(scale) * error, output));
    };
    const int64_t count = delta.rows * delta.cols;
    int64_t i = 0;
    for (; i + together <= count; i += together) {
      for (int64_t u = 0; u < together; ++u) {
        element(i + u, u);
      }
    }
    for (; i < count; ++i) {
      element(i, 0);
    }
  });
  double sum = 0;
  for (const double part : sums) {
    sum += part;
  }
  return sum;
}

} // namespace relu_mlp::cpu
