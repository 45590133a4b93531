#include "tangents.h"

#include <algorithm>

#include "formulas.h"
#include "levels.h"
#include "nodes.h"

namespace relu_mlp::node {
namespace {

using Tensors = std::vector<at::Tensor>;

// Read before the level is left, because the tangent of a view may have to be
// computed there.
at::Tensor tangent_of(const at::Tensor& tensor) {
  return tensor._fw_grad(/*level=*/0);
}

// Whether the tangent of a result has no graph at this level, and sizes are
// numbers.
bool is_served(const at::Tensor& tensor) {
  const auto needs_gradient = [](const at::Tensor& t) {
    return t.defined() && t.requires_grad() && at::GradMode::is_enabled();
  };
  return !tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides() &&
      !needs_gradient(tensor) && !needs_gradient(tangent_of(tensor));
}

Tensors tangents_of(const Tensors& tensors) {
  Tensors tangents;
  tangents.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    tangents.push_back(tangent_of(tensor));
  }
  return tangents;
}

Tensors unwrapped(Tensors tensors, const BelowAutograd& below) {
  for (at::Tensor& tensor : tensors) {
    tensor = below.unwrapped(tensor);
  }
  return tensors;
}

at::Tensor matrix_or_none(const at::Tensor& tensor) {
  return tensor.defined() ? as_matrix(tensor) : tensor;
}

// a + b, where an undefined tensor is 0. The memory of `a` may be reused.
at::Tensor sum(at::Tensor a, const at::Tensor& b) {
  if (!a.defined() || !b.defined()) {
    return a.defined() ? a : b;
  }
  return is_thread_plain() && !a._is_zerotensor() ? a.add_(b) : a + b;
}

// A result and its tangent, for the level that was left.
struct Dual {
  Dual(
      const at::Tensor& result,
      const at::Tensor& change,
      const BelowAutograd& below)
      : value(below.wrapped(result)),
        tangent(
            below.wrapped(change.defined() ? change : at::zeros_like(result))) {
  }

  // Called at that level.
  at::Tensor tensor() const {
    value._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
    return value;
  }

  at::Tensor value, tangent;
};

Tensors tensors_of(const std::vector<Dual>& duals) {
  Tensors tensors;
  tensors.reserve(duals.size());
  for (const Dual& dual : duals) {
    tensors.push_back(dual.tensor());
  }
  return tensors;
}

// y and a_1 ... a_{L-1}.
std::vector<Dual> forward_duals(const Call& call) {
  const std::size_t layers = call.weights.size();
  at::Tensor tangent = tangent_of(call.x);
  Tensors weight_tangents = tangents_of(call.weights),
          bias_tangents = tangents_of(call.biases);
  bias_tangents.resize(layers);
  const BelowAutograd below;
  weight_tangents = unwrapped(std::move(weight_tangents), below);
  bias_tangents = unwrapped(std::move(bias_tangents), below);
  tangent = matrix_or_none(below.unwrapped(tangent));
  Call values = call;
  values.x = below.unwrapped(call.x);
  values.weights = unwrapped(call.weights, below);
  values.biases = unwrapped(call.biases, below);
  ForwardResult result = run_forward(values, true);

  const at::Tensor y = as_matrix(result.y);
  at::Tensor a = as_matrix(values.x);
  std::vector<Dual> hidden;
  for (std::size_t l = 0; l < layers; ++l) {
    const at::Tensor& weight_tangent = weight_tangents[l];
    at::Tensor& bias_tangent = bias_tangents[l];
    // The stand-in for a missing bias may carry a tangent without elements.
    if (bias_tangent.defined() &&
        bias_tangent.sizes() != values.weights[l].sizes().slice(0, 1)) {
      bias_tangent.reset();
    }
    at::Tensor z_tangent;
    if (weight_tangent.defined()) {
      z_tangent = linear_layer(a, weight_tangent, bias_tangent);
    } else if (bias_tangent.defined()) {
      // Memory of its own, as it may be the result.
      z_tangent = bias_tangent.repeat({a.size(0), 1});
    }
    if (tangent.defined()) {
      z_tangent =
          sum(std::move(z_tangent), linear_layer(tangent, values.weights[l]));
    }
    tangent = std::move(z_tangent);
    if (l + 1 < layers) {
      a = result.hidden[l];
      if (tangent.defined()) {
        tangent = select(tangent, a);
      }
      hidden.emplace_back(a, tangent, below);
    }
  }
  if (tangent.defined()) {
    tangent = activation_backward(call.activation, tangent, y)
                  .reshape(result.y.sizes());
  }
  std::vector<Dual> duals{{result.y, tangent, below}};
  duals.insert(duals.end(), hidden.begin(), hidden.end());
  return duals;
}

// The needed gradients. `kept` says which of (x, y, *weights, *hidden) `saved`
// holds.
std::vector<Dual> backward_duals(
    const at::Tensor& grad_output,
    const Tensors& saved,
    const std::vector<bool>& kept,
    const std::string& activation,
    const std::string& flags) {
  const Needs needs{flags};
  const std::size_t layers = needs.layers(), lowest = needs.lowest_layer();
  at::Tensor delta_tangent = tangent_of(grad_output);
  Tensors saved_tangents = tangents_of(saved);
  const BelowAutograd below;
  const at::Tensor grad_value = below.unwrapped(grad_output);
  const Tensors values = unwrapped(saved, below);
  saved_tangents = unwrapped(std::move(saved_tangents), below);
  delta_tangent = matrix_or_none(below.unwrapped(delta_tangent));
  const Tensors gradients = run_backward(grad_value, values, activation, flags);

  // (x, y, *weights, *hidden) and their tangents.
  Tensors all(kept.size()), tangents(kept.size());
  std::size_t next = 0;
  for (std::size_t n = 0; n < kept.size(); ++n) {
    if (kept[n]) {
      all[n] = values[next];
      tangents[n] = saved_tangents[next++];
      if (n < 2) {
        all[n] = as_matrix(all[n]);
        tangents[n] = matrix_or_none(tangents[n]);
      }
    }
  }
  const auto input = [&](std::size_t l) { return l ? 1 + layers + l : 0; };
  const auto& y = all[1];

  // delta_l is read only where something that it is multiplied by changes.
  std::size_t last_read = layers;
  for (std::size_t l = layers; l-- > lowest;) {
    if ((needs.weight(l) && tangents[input(l)].defined()) ||
        (needs.reads_weight(l) && tangents[2 + l].defined())) {
      last_read = l;
    }
  }
  const at::Tensor grad = as_matrix(grad_value);
  at::Tensor delta = activation_backward(activation, grad, y);
  if (delta_tangent.defined()) {
    delta_tangent = activation_backward(activation, delta_tangent, y);
  }
  if (has_curvature(activation) && tangents[1].defined()) {
    delta_tangent =
        sum(std::move(delta_tangent),
            grad * tangents[1] * curvature(activation, y));
  }
  Tensors of_weights, of_biases;
  at::Tensor of_x;
  for (std::size_t l = layers; l-- > lowest;) {
    const at::Tensor &weight = all[2 + l], &a = all[input(l)],
                     &weight_tangent = tangents[2 + l],
                     &a_tangent = tangents[input(l)];
    if (needs.weight(l)) {
      at::Tensor change;
      if (delta_tangent.defined()) {
        change = transposed_times(delta_tangent, a);
      }
      if (a_tangent.defined()) {
        change = sum(std::move(change), transposed_times(delta, a_tangent));
      }
      of_weights.push_back(std::move(change));
    }
    if (needs.bias(l)) {
      of_biases.push_back(
          delta_tangent.defined() ? delta_tangent.sum(0) : at::Tensor());
    }
    if (!needs.reads_weight(l)) {
      continue;
    }
    at::Tensor change;
    if (delta_tangent.defined()) {
      change = times_weight(delta_tangent, weight);
    }
    if (weight_tangent.defined()) {
      change = sum(std::move(change), times_weight(delta, weight_tangent));
    }
    if (l == 0) {
      of_x = std::move(change);
      continue;
    }
    delta_tangent = change.defined() ? select(change, a) : change;
    if (l > last_read) {
      delta = select(times_weight(delta, weight), a);
    }
  }
  Tensors changes;
  if (needs.x()) {
    changes.push_back(
        of_x.defined() ? of_x.reshape(gradients[0].sizes()) : of_x);
  }
  changes.insert(changes.end(), of_weights.rbegin(), of_weights.rend());
  changes.insert(changes.end(), of_biases.rbegin(), of_biases.rend());
  std::vector<Dual> duals;
  for (std::size_t n = 0; n < gradients.size(); ++n) {
    duals.emplace_back(gradients[n], changes[n], below);
  }
  return duals;
}

} // namespace

std::optional<ForwardResult> forward_with_tangents(const Call& call) {
  const std::size_t layers = call.weights.size();
  if (is_level_unknown() || !has_formulas(call.activation) || layers == 0 ||
      (!call.biases.empty() && call.biases.size() != layers) ||
      call.any([](const at::Tensor& t) { return !is_served(t); })) {
    return std::nullopt;
  }
  Tensors results = tensors_of(forward_duals(call));
  return ForwardResult{results[0], {results.begin() + 1, results.end()}};
}

std::optional<Tensors> backward_with_tangents(
    const at::Tensor& grad_output,
    const Tensors& saved,
    const std::string& activation,
    const std::string& flags) {
  if (is_level_unknown() || !has_formulas(activation) || !is_needs(flags) ||
      flags.find('1') == std::string::npos || !is_served(grad_output) ||
      !std::all_of(saved.begin(), saved.end(), is_served)) {
    return std::nullopt;
  }
  const std::vector<bool> kept = is_kept({flags}, activation != "none");
  if (saved.size() !=
      static_cast<std::size_t>(std::count(kept.begin(), kept.end(), true))) {
    return std::nullopt;
  }
  return tensors_of(
      backward_duals(grad_output, saved, kept, activation, flags));
}

} // namespace relu_mlp::node
