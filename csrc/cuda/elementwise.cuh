// What happens to single elements between two products. The arithmetic is in
// float32 for 16-bit formats, and in double for double.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "../mlp.h"
#include "machine.h"

namespace relu_mlp::cuda {

template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// ReLU passes NaN on.
template <typename C>
RELU_MLP_HOST_DEVICE C relu(C z) {
  return z <= C(0) ? C(0) : z;
}

// What a ReLU whose result is `a` lets through of a change. It selects and does
// not multiply: an infinite gradient at a unit that is off gives 0.
template <typename C>
RELU_MLP_HOST_DEVICE C select(C change, C a) {
  return a <= C(0) ? C(0) : change;
}

// grad * phi'(z), with phi' written in terms of y = phi(z). The order of the
// factors is PyTorch's, so that 0 * inf turns up in the same places.
template <typename C>
RELU_MLP_HOST_DEVICE C times_derivative(Activation phi, C grad, C y) {
  switch (phi) {
    case Activation::relu:
      return select(grad, y);
    case Activation::sigmoid:
      return grad * (C(1) - y) * y;
    case Activation::tanh:
      return grad * (C(1) - y * y);
    default:
      return grad;
  }
}

} // namespace relu_mlp::cuda
