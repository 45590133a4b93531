// What a backward pass is asked for, as plain data.
#pragma once

#include <vector>

#include "../mlp.h"

namespace relu_mlp::cpu {

// An operand that `needs` makes superfluous has no data.
template <typename T>
struct BackwardPass {
  Needs needs;
  // a_1 ... a_{L-1} and y; with `recompute` they are missing, and computed again.
  std::vector<Matrix<const T>> hidden;
  Matrix<const T> y;
  bool recompute;

  // Either the gradient of y, of any strides, or, where `squares` is not null, the target
  // of the loss loss_scale * sum (y - target)^2. That sum is added to *squares.
  Matrix<const T> grad_output;
  Matrix<const T> target;
  double loss_scale;
  double* squares;

  // The results, contiguous; null where not needed.
  T* grad_x;
  std::vector<T*> grad_weights, grad_biases;
};

} // namespace relu_mlp::cpu
