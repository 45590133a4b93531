#include "batching.h"

#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/functorch/DynamicLayer.h>
#include <ATen/functorch/PlumbingHelper.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "direct_passes.h"
#include "formulas.h"
#include "kernels.h"
#include "nodes.h"
#include "operators.h"
#include "python.h"

namespace relu_mlp::node {
namespace {

using at::functorch::isBatchedAtLevel;

// The level of the vmap that this thread runs; std::nullopt if Python has to
// serve it.
std::optional<int64_t> level_of_vmap() {
  const auto& levels = at::functorch::getDynamicLayerStack();
  if (!is_enabled || levels.empty() ||
      levels.back().key() != at::functorch::TransformType::Vmap) {
    return std::nullopt;
  }
  return levels.back().layerId();
}

// Leaves the innermost level for the next one, as PyTorch does for each
// operation of a batching rule. Autocast has done its work above.
class NextLevel {
 public:
  NextLevel()
      : keys_(at::functorch::getDynamicLayerStack()
                  .back()
                  .interpreter()
                  .getSavedLocalDispatchKeySet()),
        level_(at::functorch::popDynamicLayer()),
        no_autocast_(c10::autocast_dispatch_keyset) {}
  NextLevel(const NextLevel&) = delete;
  ~NextLevel() {
    at::functorch::pushDynamicLayer(std::move(level_));
  }

 private:
  const c10::impl::ForceDispatchKeyGuard keys_;
  at::functorch::DynamicLayer level_;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast_;
};

// A tensor below vmap. The batch dimension comes first.
struct Operand {
  at::Tensor tensor;
  bool is_batched = false;
};

class Unwrapped {
 public:
  Unwrapped(const at::Tensor& tensor, int64_t level) {
    std::tie(value_, dim_) = at::functorch::unwrapTensorAtLevel(tensor, level);
  }

  bool has_numeric_sizes() const {
    return !value_.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  }
  bool is_batched() const {
    return dim_.has_value();
  }
  const at::Tensor& value() const {
    return value_;
  }
  // Without the batch dimension.
  int64_t dim() const {
    return value_.dim() - is_batched();
  }
  at::DimVector sizes() const {
    at::DimVector sizes(value_.sizes());
    if (dim_) {
      sizes.erase(sizes.begin() + *dim_);
    }
    return sizes;
  }

  // Called at the next level.
  Operand operand() const {
    return {
        dim_.value_or(0) == 0 ? value_ : value_.movedim(*dim_, 0),
        is_batched()};
  }

 private:
  at::Tensor value_;
  std::optional<int64_t> dim_;
};

// Whether the passes on plain data may serve a call at this level.
bool is_plain_level() {
  return is_thread_plain() && !is_observed();
}

ForwardResult run_forward(const Call& call, bool save_hidden) {
  if (is_plain_level() && !needs_gradient(call) && !call.any(carries_tangent)) {
    if (auto result = direct_forward(call, save_hidden)) {
      return std::move(*result);
    }
  }
  auto [y, hidden] = operators::forward(call, save_hidden);
  return {std::move(y), std::move(hidden)};
}

// The rule where all examples share the network: their rows are one batch.
std::optional<ForwardResult> forward_of_rows(
    const Call& call,
    bool save_hidden) {
  const std::optional<int64_t> level = level_of_vmap();
  if (!level || isBatchedAtLevel(at::TensorList(call.weights), *level) ||
      isBatchedAtLevel(at::TensorList(call.biases), *level)) {
    return std::nullopt;
  }
  const Unwrapped x(call.x, *level);
  if (!x.has_numeric_sizes() || x.dim() == 0 ||
      !python::is_extension_in_force(x.value())) {
    return std::nullopt;
  }
  const NextLevel guard;
  Call below = call;
  below.x = x.operand().tensor;
  ForwardResult result = run_forward(below, save_hidden);
  if (x.is_batched()) {
    result.y = at::functorch::makeBatched(std::move(result.y), 0, *level);
    for (at::Tensor& a : result.hidden) {
      a = at::functorch::makeBatched(
          a.reshape({below.x.size(0), rows_of(below.x, 1), a.size(1)}), 0,
          *level);
    }
  }
  return result;
}

at::Tensor relu_mlp(
    const at::Tensor& x,
    at::TensorList weights,
    at::TensorList biases,
    std::string_view activation) {
  const Call call{x, weights.vec(), biases.vec(), std::string(activation)};
  auto result = forward_of_rows(call, false);
  return result ? std::move(result->y) : python::batched::relu_mlp(call);
}

std::tuple<at::Tensor, std::vector<at::Tensor>> forward(
    const at::Tensor& x,
    at::TensorList weights,
    at::TensorList biases,
    std::string_view activation,
    bool save_hidden) {
  const Call call{x, weights.vec(), biases.vec(), std::string(activation)};
  auto result = forward_of_rows(call, save_hidden);
  if (!result) {
    return python::batched::forward(call, save_hidden);
  }
  return {std::move(result->y), std::move(result->hidden)};
}

// (*, features) as (rows, features), after the batch dimension if there is one.
at::Tensor as_matrices(const Operand& operand) {
  const at::Tensor& tensor = operand.tensor;
  if (!operand.is_batched) {
    return as_matrix(tensor);
  }
  return tensor.dim() == 3
      ? tensor
      : tensor.reshape({tensor.size(0), rows_of(tensor, 1), tensor.size(-1)});
}

// What a backward pass reads, as matrices. Those that differ between the
// examples have the batch dimension before that. Undefined where nothing is
// saved.
struct Operands {
  at::Tensor delta; // the gradient of y at first
  at::Tensor y;
  std::vector<at::Tensor> weights;
  std::vector<at::Tensor> inputs; // x, a_1, ..., a_{L-1}
};

// std::nullopt if `saved` is not what `needs` asks for, or holds weights that
// differ.
std::optional<Operands> operands_of(
    const Unwrapped& grad_output,
    const std::vector<Unwrapped>& saved,
    bool has_activation,
    const Needs& needs) {
  const std::size_t layers = needs.layers();
  const std::vector<bool> kept = is_kept(needs, has_activation);
  if (saved.size() !=
      static_cast<std::size_t>(std::count(kept.begin(), kept.end(), true))) {
    return std::nullopt;
  }
  Operands operands{as_matrices(grad_output.operand()), {}, {}, {}};
  operands.weights.resize(layers);
  operands.inputs.resize(layers);
  auto next = saved.begin();
  for (std::size_t n = 0; n < kept.size(); ++n) {
    if (!kept[n]) {
      continue;
    }
    const Unwrapped& tensor = *next++;
    if (n >= 2 && n < 2 + layers) {
      if (tensor.is_batched() || tensor.dim() != 2) {
        return std::nullopt;
      }
      operands.weights[n - 2] = tensor.value();
      continue;
    }
    if (tensor.dim() == 0) {
      return std::nullopt;
    }
    (n == 0       ? operands.inputs[0]
         : n == 1 ? operands.y
                  : operands.inputs[n - 1 - layers]) =
        as_matrices(tensor.operand());
  }
  return operands;
}

std::vector<at::Tensor> run_backward(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& needs) {
  if (is_plain_level() && !needs_gradient(grad_output, saved) &&
      !carries_tangent(grad_output) &&
      std::none_of(saved.begin(), saved.end(), carries_tangent)) {
    if (auto gradients =
            direct_backward(grad_output, saved, activation, needs, {})) {
      std::erase_if(
          *gradients, [](const at::Tensor& grad) { return !grad.defined(); });
      return std::move(*gradients);
    }
  }
  return operators::backward(grad_output, saved, activation, needs);
}

// The gradient of x alone, where all that is summed over is shared: all
// examples are one batch. std::nullopt in all other cases.
std::optional<at::Tensor> gradient_of_rows(
    const Operands& operands,
    const std::string& activation,
    const std::string& flags) {
  std::vector<at::Tensor> of_rows{operands.delta};
  if (operands.y.defined()) {
    of_rows.push_back(operands.y);
  }
  of_rows.insert(
      of_rows.end(), operands.inputs.begin() + 1, operands.inputs.end());
  if (flags.find('1', 1) != std::string::npos ||
      !std::all_of(of_rows.begin(), of_rows.end(), [](const at::Tensor& t) {
        return t.dim() == 3;
      })) {
    return std::nullopt;
  }
  for (at::Tensor& tensor : of_rows) {
    tensor = tensor.flatten(0, 1);
  }
  const auto first_hidden = of_rows.begin() + 1 + operands.y.defined();
  std::vector<at::Tensor> saved(of_rows.begin() + 1, first_hidden);
  saved.insert(saved.end(), operands.weights.begin(), operands.weights.end());
  saved.insert(saved.end(), first_hidden, of_rows.end());
  const at::Tensor of_x = run_backward(of_rows[0], saved, activation, flags)[0];
  return of_x.reshape(
      {operands.delta.size(0), operands.delta.size(1), of_x.size(1)});
}

// delta^T a; for one row, where nothing is summed, in one pass over memory.
at::Tensor transposed_product(const at::Tensor& delta, const at::Tensor& a) {
  return a.size(-2) == 1 ? delta.mT() * a : delta.mT().matmul(a);
}

// The needed gradients in order of `needs`, from the operands.
std::vector<at::Tensor> gradients_of(
    const Operands& operands,
    const std::string& activation,
    const Needs& needs) {
  const std::size_t layers = needs.layers();
  std::vector<at::Tensor> of_weights, of_biases;
  at::Tensor delta =
      activation_backward(activation, operands.delta, operands.y);
  for (std::size_t l = layers; l-- > needs.lowest_layer();) {
    const at::Tensor& a = operands.inputs[l];
    if (needs.weight(l)) {
      of_weights.push_back(transposed_product(delta, a));
    }
    if (needs.bias(l)) {
      of_biases.push_back(delta.sum(-2));
    }
    if (needs.reads_weight(l)) {
      delta = delta.matmul(operands.weights[l]);
      if (l > 0) {
        if (delta.sizes() == a.sizes()) {
          delta = select(delta, a);
        } else {
          const auto same = at::broadcast_tensors({delta, a});
          delta = select(same[0], same[1]);
        }
      }
    }
  }
  std::vector<at::Tensor> gradients;
  if (needs.x()) {
    gradients.push_back(std::move(delta));
  }
  gradients.insert(gradients.end(), of_weights.rbegin(), of_weights.rend());
  gradients.insert(gradients.end(), of_biases.rbegin(), of_biases.rend());
  return gradients;
}

// The rule where all examples share the weights. The gradients of parameters
// are wanted for each example, so they are not summed over the examples.
std::optional<std::vector<at::Tensor>> backward_of_rows(
    const at::Tensor& grad_output,
    at::TensorList saved,
    const std::string& activation,
    const std::string& flags) {
  const std::optional<int64_t> level = level_of_vmap();
  if (!level || !is_needs(flags) || flags.find('1') == std::string::npos ||
      !has_formulas(activation)) {
    return std::nullopt;
  }
  const Unwrapped grad(grad_output, *level);
  bool is_batched = grad.is_batched();
  bool has_numeric_sizes = grad.has_numeric_sizes();
  std::vector<Unwrapped> below;
  below.reserve(saved.size());
  for (const at::Tensor& tensor : saved) {
    below.emplace_back(tensor, *level);
    is_batched = is_batched || below.back().is_batched();
    has_numeric_sizes = has_numeric_sizes && below.back().has_numeric_sizes();
  }
  if (!has_numeric_sizes || grad.dim() == 0 ||
      !python::is_extension_in_force(grad.value())) {
    return std::nullopt;
  }
  const NextLevel guard;
  if (!is_batched) {
    return run_backward(grad_output, saved.vec(), activation, flags);
  }
  const Needs needs{flags};
  const auto operands = operands_of(grad, below, activation != "none", needs);
  if (!operands) {
    return std::nullopt;
  }
  std::vector<at::Tensor> gradients;
  if (auto of_x = gradient_of_rows(*operands, activation, flags)) {
    gradients.push_back(std::move(*of_x));
  } else {
    gradients = gradients_of(*operands, activation, needs);
  }
  const auto finish = [&](at::Tensor& gradient, int64_t dims) {
    if (gradient.dim() > dims) {
      gradient = at::functorch::makeBatched(std::move(gradient), 0, *level);
    }
  };
  std::size_t next = 0;
  if (needs.x()) {
    at::Tensor& of_x = gradients[next++];
    at::DimVector sizes = grad.sizes();
    sizes.back() = of_x.size(-1);
    const int64_t dims = int64_t(sizes.size());
    if (of_x.dim() > 2) {
      sizes.insert(sizes.begin(), of_x.size(0));
    }
    of_x = of_x.reshape(sizes);
    finish(of_x, dims);
  }
  for (std::size_t n = 1; n < flags.size(); ++n) {
    if (flags[n] == '1') {
      finish(gradients[next++], n <= needs.layers() ? 2 : 1);
    }
  }
  return gradients;
}

std::vector<at::Tensor> backward(
    const at::Tensor& grad_output,
    at::TensorList saved,
    std::string_view activation_view,
    std::string_view needs_view) {
  const std::string activation(activation_view), needs(needs_view);
  auto gradients = backward_of_rows(grad_output, saved, activation, needs);
  return gradients
      ? std::move(*gradients)
      : python::batched::backward(grad_output, saved.vec(), activation, needs);
}

} // namespace

void register_batching_rules() {
  static const torch::Library* const library = [] {
    auto* made = new torch::Library(
        torch::Library::IMPL, "relu_mlp", c10::DispatchKey::FuncTorchBatched,
        __FILE__, __LINE__);
    made->impl("relu_mlp", relu_mlp);
    made->impl("forward", forward);
    made->impl("backward", backward);
    return made;
  }();
  static_cast<void>(library);
}

} // namespace relu_mlp::node
