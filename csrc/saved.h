// Unpacks the list `saved` of the operator `backward` into named operands, and
// checks them.
#pragma once

#include "checks.h"
#include "passes.h"

namespace relu_mlp {

inline void check_operand(
    const Tensor& tensor,
    const Tensor& grad_output,
    int64_t rows,
    int64_t cols,
    const char* name,
    std::size_t l) {
  if (tensor.dim() != 2 || tensor.size(0) != rows || tensor.size(1) != cols ||
      tensor.dtype() != grad_output.dtype()) {
    fail(
        "relu_mlp::backward: ", name, " of layer ", l, " must be ",
        dtype_name(grad_output), " of shape (", rows, ", ", cols, "), got ",
        dtype_name(tensor), " of shape ", shape(tensor));
  }
}

// Returns the tensors of `saved` as named operands. Needs says which operands
// are saved. Their order is x, y, the weights, a_1 ... a_{L-1}. Only
// autograd.py calls the operator, with the tensors that it saved. The checks
// keep a mistake there from reading out of bounds. The holders own x and y if
// these had to be reshaped.
inline Saved unpack(
    const std::vector<Tensor>& saved,
    const Tensor& grad_output,
    Activation output_activation,
    const Needs& needs,
    Tensor& x_holder,
    Tensor& y_holder) {
  const std::size_t layers = needs.layers(), lowest = needs.lowest_layer();
  std::size_t next = 0;
  const auto next_if = [&](bool is_saved) -> const Tensor* {
    if (!is_saved) {
      return nullptr;
    }
    if (next == saved.size()) {
      fail(
          "relu_mlp::backward: needs ", needs.flags, " asks for more than the ",
          saved.size(), " tensors in saved");
    }
    return &saved[next++];
  };
  const auto next_matrix_if = [&](bool is_saved, Tensor& holder) {
    const Tensor* tensor = next_if(is_saved);
    if (tensor && tensor->dim() == 0) {
      fail("relu_mlp::backward: saved must have no tensor of shape ()");
    }
    return tensor ? &as_matrix(*tensor, holder) : nullptr;
  };

  Saved result;
  result.inputs.reserve(layers);
  result.weights.reserve(layers);
  result.inputs.push_back(next_matrix_if(needs.reads_input(0), x_holder));
  result.y = next_matrix_if(needs.reads_y(output_activation), y_holder);
  for (std::size_t l = 0; l < layers; ++l) {
    result.weights.push_back(next_if(needs.reads_weight(l)));
  }
  for (std::size_t l = 1; l < layers; ++l) {
    result.inputs.push_back(next_if(needs.reads_input(l)));
  }
  if (next != saved.size()) {
    fail(
        "relu_mlp::backward: needs ", needs.flags, " asks for ", next,
        " tensors in saved, got ", saved.size());
  }

  const int64_t rows = grad_output.size(0);
  int64_t features = grad_output.size(1);
  if (result.y) {
    check_operand(
        *result.y, grad_output, rows, features, "the output", layers - 1);
  }
  for (std::size_t l = layers; l-- > lowest;) {
    const Tensor *weight = result.weights[l], *input = result.inputs[l];
    const Tensor* has_width = weight ? weight : input;
    if (!has_width) {
      continue;
    }
    if (has_width->dim() != 2) {
      fail(
          "relu_mlp::backward: saved must have matrices, got shape ",
          shape(*has_width));
    }
    const int64_t width = has_width->size(1);
    if (weight) {
      check_operand(*weight, grad_output, features, width, "the weight", l);
    }
    if (input) {
      check_operand(*input, grad_output, rows, width, "the input", l);
    }
    features = width;
  }
  return result;
}

} // namespace relu_mlp
