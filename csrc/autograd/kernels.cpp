// The operators' kernels on the Autograd key. The dispatcher calls them once
// for each level of a functorch transform, or once where there is none.
#include <torch/library.h>

#include "kernels.h"
#include <algorithm>

#include "nodes.h"
#include "operators.h"
#include "python.h"

namespace relu_mlp::node {

bool is_enabled = true;

namespace {

// Whether the nodes serve a call: without tangents, by the extension.
bool serves(const at::Tensor& first, bool has_tangent) {
  return is_enabled && !has_tangent && python::is_extension_in_force(first);
}

bool any_tangent(
    const at::Tensor& tensor,
    const std::vector<at::Tensor>& others) {
  return carries_tangent(tensor) ||
      std::any_of(others.begin(), others.end(), carries_tangent);
}

Call call_of(
    const at::Tensor& x,
    at::TensorList weights,
    at::TensorList biases,
    std::string_view activation) {
  return {x, weights.vec(), biases.vec(), std::string(activation)};
}

at::Tensor relu_mlp(
    const at::Tensor& x,
    at::TensorList weights,
    at::TensorList biases,
    std::string_view activation) {
  const Call call = call_of(x, weights, biases, activation);
  if (!serves(x, call.any(carries_tangent))) {
    return python::relu_mlp(call);
  }
  if (!weights.empty() && needs_gradient(call)) {
    return recorded_relu_mlp(call);
  }
  const at::AutoDispatchBelowAutograd guard;
  return operators::relu_mlp(call);
}

std::tuple<at::Tensor, std::vector<at::Tensor>> forward(
    const at::Tensor& x,
    at::TensorList weights,
    at::TensorList biases,
    std::string_view activation,
    bool save_hidden) {
  const Call call = call_of(x, weights, biases, activation);
  if (!serves(x, call.any(carries_tangent))) {
    return python::forward(call, save_hidden);
  }
  if (!weights.empty() && needs_gradient(call)) {
    ForwardResult result = recorded_forward(call);
    if (!save_hidden) {
      result.hidden.clear();
    }
    return {std::move(result.y), std::move(result.hidden)};
  }
  const at::AutoDispatchBelowAutograd guard;
  return operators::forward(call, save_hidden);
}

std::vector<at::Tensor> backward(
    const at::Tensor& grad_output,
    at::TensorList saved_list,
    std::string_view activation_view,
    std::string_view needs_view) {
  const std::vector<at::Tensor> saved = saved_list.vec();
  const std::string activation(activation_view), needs(needs_view);
  if (!serves(grad_output, any_tangent(grad_output, saved))) {
    return python::backward(grad_output, saved, activation, needs);
  }
  if (needs.find('1') != std::string::npos &&
      needs_gradient(grad_output, saved)) {
    return recorded_backward(grad_output, saved, activation, needs);
  }
  const at::AutoDispatchBelowAutograd guard;
  return operators::backward(grad_output, saved, activation, needs);
}

} // namespace

void register_kernels() {
  static const torch::Library* const library = [] {
    auto* made = new torch::Library(
        torch::Library::IMPL, "relu_mlp", c10::DispatchKey::Autograd, __FILE__,
        __LINE__);
    made->impl("relu_mlp", relu_mlp);
    made->impl("forward", forward);
    made->impl("backward", backward);
    return made;
  }();
  static_cast<void>(library);
}

} // namespace relu_mlp::node
