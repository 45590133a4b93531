// The levels of functorch's transforms. A kernel runs at the innermost level
// and computes at the next one, as PyTorch does for each operation. At the
// bottom there are no levels, and no wrappers of tensors.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/functorch/DynamicLayer.h>
#include <ATen/functorch/TensorWrapper.h>
#include <c10/core/GradMode.h>

#include <optional>

#include "direct_passes.h"

namespace relu_mlp::node {

// The level whose kernel this thread runs; null at the bottom.
const at::functorch::DynamicLayer* running_level();

// Whether Python has to find out at which level it is.
bool is_level_unknown();

// Leaves the innermost level for the next one, for as long as this lives.
// Autocast has done its work above.
class NextLevel {
 public:
  NextLevel();
  NextLevel(const NextLevel&) = delete;
  ~NextLevel();

  const at::functorch::Interpreter& left() const {
    return left_.interpreter();
  }

 private:
  const c10::impl::ForceDispatchKeyGuard keys_;
  at::functorch::DynamicLayer left_;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast_;
};

// The same for a level of autograd or of forward mode, or the bottom, where
// what follows is below autograd.
class BelowAutograd {
 public:
  BelowAutograd();

  // A tensor of the level that was left, as the next level has it.
  at::Tensor unwrapped(const at::Tensor& tensor) const;
  // A tensor of the next level, for the one that was left.
  at::Tensor wrapped(at::Tensor tensor) const;

 private:
  std::optional<NextLevel> next_;
  std::optional<at::AutoDispatchBelowAutograd> bottom_;
  std::optional<c10::AutoGradMode> no_grad_;
  std::optional<c10::AutoFwGradMode> no_fw_grad_;
};

// The passes at the present level.
ForwardResult run_forward(const Call& call, bool save_hidden);
std::vector<at::Tensor> run_backward( // the needed gradients only
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& needs);

// Products, by the direct passes where these can serve them:
at::Tensor linear_layer( // a W^T + b
    const at::Tensor& a,
    const at::Tensor& weight,
    const at::Tensor& bias = {});
at::Tensor times_weight(const at::Tensor& delta, const at::Tensor& weight);
at::Tensor transposed_times( // delta^T a
    const at::Tensor& delta,
    const at::Tensor& a);

} // namespace relu_mlp::node
