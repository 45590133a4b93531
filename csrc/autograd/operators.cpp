#include "operators.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace relu_mlp::node::operators {
namespace {

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "")
      .typed<Signature>();
}

} // namespace

at::Tensor relu_mlp(const Call& call) {
  static const auto op = find<at::Tensor(
      const at::Tensor&, at::TensorList, at::TensorList, std::string_view)>(
      "relu_mlp::relu_mlp");
  return op.call(call.x, call.weights, call.biases, call.activation);
}

std::tuple<at::Tensor, std::vector<at::Tensor>> forward(
    const Call& call,
    bool save_hidden) {
  static const auto op = find<std::tuple<at::Tensor, std::vector<at::Tensor>>(
      const at::Tensor&, at::TensorList, at::TensorList, std::string_view,
      bool)>("relu_mlp::forward");
  return op.call(
      call.x, call.weights, call.biases, call.activation, save_hidden);
}

std::vector<at::Tensor> backward(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& needs) {
  static const auto op = find<std::vector<at::Tensor>(
      const at::Tensor&, at::TensorList, std::string_view, std::string_view)>(
      "relu_mlp::backward");
  return op.call(grad_output, saved, activation, needs);
}

std::vector<at::Tensor> recompute_backward(
    const at::Tensor& grad_output,
    const Call& call,
    const std::string& needs) {
  static const auto op = find<std::vector<at::Tensor>(
      const at::Tensor&, const at::Tensor&, at::TensorList, at::TensorList,
      std::string_view, std::string_view)>("relu_mlp::recompute_backward");
  return op.call(
      grad_output, call.x, call.weights, call.biases, call.activation, needs);
}

} // namespace relu_mlp::node::operators
