#include "levels.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "nodes.h"
#include "operators.h"

namespace relu_mlp::node {
namespace {

using at::functorch::TransformType;

// Whether the passes on plain data may serve a call: nothing is active here,
// and no tensor is differentiated.
bool is_direct(
    const at::Tensor& tensor,
    const std::vector<at::Tensor>& others) {
  return is_thread_plain() && !is_observed() &&
      !needs_gradient(tensor, others) && !carries_tangent(tensor) &&
      std::none_of(others.begin(), others.end(), carries_tangent);
}

} // namespace

const at::functorch::DynamicLayer* running_level() {
  const auto& levels = at::functorch::getDynamicLayerStack();
  return levels.empty() ? nullptr : &levels.back();
}

bool is_level_unknown() {
  // A level excludes the key by which operations reach it.
  return running_level() &&
      !c10::impl::tls_is_dispatch_key_excluded(
             c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

NextLevel::NextLevel()
    : keys_(running_level()->interpreter().getSavedLocalDispatchKeySet()),
      left_(at::functorch::popDynamicLayer()),
      no_autocast_(c10::autocast_dispatch_keyset) {}

NextLevel::~NextLevel() {
  at::functorch::pushDynamicLayer(std::move(left_));
}

BelowAutograd::BelowAutograd() {
  if (!running_level()) {
    bottom_.emplace();
    return;
  }
  next_.emplace();
  const at::functorch::Interpreter& left = next_->left();
  if (left.key() == TransformType::Grad &&
      !at::functorch::GradInterpreterPtr(&left).prevGradMode()) {
    no_grad_.emplace(false);
  }
  if (left.key() == TransformType::Jvp &&
      !at::functorch::JvpInterpreterPtr(&left).prevFwdGradMode()) {
    no_fw_grad_.emplace(false);
  }
}

at::Tensor BelowAutograd::unwrapped(const at::Tensor& tensor) const {
  const auto* wrapper = next_ && tensor.defined()
      ? at::functorch::maybeGetTensorWrapper(tensor)
      : nullptr;
  return wrapper && wrapper->level() == next_->left().level() ? wrapper->value()
                                                              : tensor;
}

at::Tensor BelowAutograd::wrapped(at::Tensor tensor) const {
  return next_ ? at::functorch::makeTensorWrapper(tensor, next_->left())
               : tensor;
}

ForwardResult run_forward(const Call& call, bool save_hidden) {
  if (is_direct(call.x, call.weights) && is_direct(call.x, call.biases)) {
    if (auto result = direct_forward(call, save_hidden)) {
      return std::move(*result);
    }
  }
  auto [y, hidden] = operators::forward(call, save_hidden);
  return {std::move(y), std::move(hidden)};
}

std::vector<at::Tensor> run_backward(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& needs) {
  if (is_direct(grad_output, saved)) {
    if (auto gradients =
            direct_backward(grad_output, saved, activation, needs, {})) {
      std::erase_if(
          *gradients, [](const at::Tensor& grad) { return !grad.defined(); });
      return std::move(*gradients);
    }
  }
  return operators::backward(grad_output, saved, activation, needs);
}

at::Tensor linear_layer(
    const at::Tensor& a,
    const at::Tensor& weight,
    const at::Tensor& bias) {
  const Call call{
      a,
      {weight},
      bias.defined() ? std::vector<at::Tensor>{bias}
                     : std::vector<at::Tensor>{},
      "none"};
  if (is_direct(a, {weight}) && is_direct(a, call.biases)) {
    if (auto result = direct_forward(call, false)) {
      return std::move(result->y);
    }
  }
  return at::linear(a, weight, bias);
}

at::Tensor times_weight(const at::Tensor& delta, const at::Tensor& weight) {
  if (is_direct(delta, {weight})) {
    if (auto grads = direct_backward(delta, {weight}, "none", "100", {})) {
      return std::move((*grads)[0]);
    }
  }
  return delta.mm(weight);
}

at::Tensor transposed_times(const at::Tensor& delta, const at::Tensor& a) {
  if (is_direct(delta, {a})) {
    if (auto grads = direct_backward(delta, {a}, "none", "010", {})) {
      return std::move((*grads)[1]);
    }
  }
  return delta.t().mm(a);
}

} // namespace relu_mlp::node
