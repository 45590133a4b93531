// The formulas of relu_mlp/activations.py and relu_mlp/reference.py as PyTorch
// operations, which every transform can differentiate.
#pragma once

#include <ATen/ATen.h>

#include <string>

namespace relu_mlp::node {

// Whether `activation_backward` knows this activation.
inline bool has_formulas(const std::string& activation) {
  return activation == "none" || activation == "relu" ||
      activation == "sigmoid" || activation == "tanh";
}

// `change` where a > 0 or is NaN, 0 elsewhere.
inline at::Tensor select(const at::Tensor& change, const at::Tensor& a) {
  return at::threshold_backward(change, a, 0);
}

// The gradient of z for that of y = phi(z).
inline at::Tensor activation_backward(
    const std::string& activation,
    const at::Tensor& grad,
    const at::Tensor& y) {
  return activation == "relu"   ? select(grad, y)
      : activation == "sigmoid" ? at::sigmoid_backward(grad, y)
      : activation == "tanh"    ? at::tanh_backward(grad, y)
                                : grad;
}

// The product of all sizes but the last, from dimension `first` on.
inline int64_t rows_of(const at::Tensor& tensor, int64_t first = 0) {
  int64_t rows = 1;
  for (int64_t d = first; d + 1 < tensor.dim(); ++d) {
    rows *= tensor.size(d);
  }
  return rows;
}

// (*, features) as (rows, features).
inline at::Tensor as_matrix(const at::Tensor& tensor) {
  return tensor.dim() == 2 ? tensor
                           : tensor.reshape({rows_of(tensor), tensor.size(-1)});
}

} // namespace relu_mlp::node
