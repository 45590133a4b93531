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

// The checks that do not depend on which operands they are.
inline void check_saved(
    const Tensor& grad_output,
    const std::vector<Tensor>& saved,
    bool checks_devices) {
  check_storage(grad_output, "relu_mlp::backward: grad_output");
  for (std::size_t n = 0; n < saved.size(); ++n) {
    if (checks_devices && !are_on_same_device(saved[n], grad_output)) {
      fail(
          "relu_mlp::backward: saved[", n, "] must be on ",
          device_name(grad_output), " like grad_output, got ",
          device_name(saved[n]));
    }
    check_storage(saved[n], "relu_mlp::backward: saved[", n, "]");
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

// Returns the tensors of `cotangents` by name. `given` has a '1' for every
// result of the backward pass that has one. `saved` is what `unpack` returned
// for the same needs. x_holder owns that of x if it had to be reshaped.
inline Cotangents unpack_cotangents(
    const std::vector<Tensor>& cotangents,
    const std::string& given,
    const Tensor& grad_output,
    const Saved& saved,
    const Needs& needs,
    Tensor& x_holder) {
  const std::size_t layers = needs.layers();
  auto is_given = given.begin();
  std::size_t next = 0;
  const auto next_if = [&](bool is_result, auto expected) -> const Tensor* {
    if (!is_result || *is_given++ == '0') {
      return nullptr;
    }
    const Tensor& tensor = cotangents[next];
    const std::vector<int64_t> sizes = expected();
    if (tensor.dtype() != grad_output.dtype() ||
        !std::equal(
            sizes.begin(), sizes.end(), tensor.sizes(),
            tensor.sizes() + tensor.dim())) {
      fail(
          "relu_mlp::backward_vjp: cotangents[", next, "] must be ",
          dtype_name(grad_output), " of shape ", shape(sizes), ", got ",
          dtype_name(tensor), " of shape ", shape(tensor));
    }
    check_storage(tensor, "relu_mlp::backward_vjp: cotangents[", next, "]");
    ++next;
    return &tensor;
  };
  using Sizes = std::vector<int64_t>;
  const auto width = [&](std::size_t l) { // of the input of layer l, or of y
    const int64_t last = grad_output.size(grad_output.dim() - 1);
    return l < layers ? saved.inputs[l]->size(1) : last;
  };

  Cotangents result{};
  const Tensor* const x = next_if(needs.x(), [&] {
    Sizes sizes(grad_output.sizes(), grad_output.sizes() + grad_output.dim());
    sizes.back() = saved.weights[0]->size(1);
    return sizes;
  });
  result.x = x ? &as_matrix(*x, x_holder) : nullptr;
  for (std::size_t l = 0; l < layers; ++l) {
    result.weights.push_back(next_if(
        needs.weight(l), [&] { return Sizes{width(l + 1), width(l)}; }));
  }
  for (std::size_t l = 0; l < layers; ++l) {
    result.biases.push_back(
        next_if(needs.bias(l), [&] { return Sizes{width(l + 1)}; }));
  }
  return result;
}

} // namespace relu_mlp
