#include "nodes.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include <cstdlib>
#include <mutex>

#include "compiled_autograd.h"
#include "operators.h"
#include "python.h"

namespace relu_mlp::node {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;

bool is_recording() {
  return at::GradMode::is_enabled();
}

// Frees the memory of symbolic zeros, which are recognized by it.
void free_symbolic_zeros(void* data) {
  std::free(data);
}

// Zeros that only say that a mask has been passed. They have their own memory,
// because autograd may add to them in place.
at::Tensor symbolic_zeros_like(const at::Tensor& tensor) {
  if (!tensor.is_cpu() || !is_plain(tensor)) {
    return at::zeros_like(tensor);
  }
  // The system gives large memory as zeros, which nobody reads.
  void* data = std::calloc(tensor.numel() + 1, tensor.itemsize());
  TORCH_CHECK(data, "DefaultCPUAllocator: can't allocate memory");
  return at::for_blob(data, tensor.sizes())
      .context(data, free_symbolic_zeros)
      .options(tensor.options())
      .make_tensor();
}

// Whether a tensor comes from `symbolic_zeros_like` and is unchanged. If
// autograd adds to it in place, or a hook changes it, its version increases.
bool is_symbolic_zero(const at::Tensor& tensor) {
  return tensor.defined() && tensor.is_cpu() && is_plain(tensor) &&
      !tensor.is_inference() && tensor._version() == 0 &&
      tensor.storage().data_ptr().get_deleter() == free_symbolic_zeros;
}

} // namespace

std::vector<bool> is_kept(const Needs& needs, bool has_activation) {
  const std::size_t layers = needs.layers();
  std::vector<bool> kept(1 + 1 + layers + (layers - 1));
  kept[0] = needs.reads_input(0);
  kept[1] = has_activation && needs.lowest_layer() < layers;
  for (std::size_t l = 0; l < layers; ++l) {
    kept[2 + l] = needs.reads_weight(l);
  }
  for (std::size_t l = 1; l < layers; ++l) {
    kept[1 + layers + l] = needs.reads_input(l);
  }
  return kept;
}

namespace {

// One for x, every weight and every bias; a missing bias has none.
std::string needs_of(const Call& call) {
  const std::size_t layers = call.weights.size();
  std::string needs(1 + 2 * layers, '0');
  const auto set = [&](std::size_t n, const at::Tensor& tensor) {
    if (tensor.requires_grad()) {
      needs[n] = '1';
    }
  };
  set(0, call.x);
  for (std::size_t l = 0; l < layers; ++l) {
    set(1 + l, call.weights[l]);
  }
  for (std::size_t l = 0; l < call.biases.size(); ++l) {
    // The stand-in for a missing bias has no gradient.
    const at::Tensor& bias = call.biases[l];
    if (bias.sym_numel() != 0 ||
        bias.sym_sizes() == call.weights[l].sym_sizes().slice(0, 1)) {
      set(1 + layers + l, bias);
    }
  }
  return needs;
}

// The gradients of `returned`, a list of only those that `needs` names, at
// their places.
variable_list at_their_places(
    std::vector<at::Tensor> returned,
    const std::string& needs,
    std::size_t outputs) {
  variable_list all(outputs);
  std::size_t next = 0;
  for (std::size_t n = 0; n < needs.size(); ++n) {
    if (needs[n] == '1') {
      all[n] = std::move(returned[next++]);
    }
  }
  return all;
}

// Autocast has done its work in the forward pass.
const c10::DispatchKeySet& autocast_keys() {
  return c10::autocast_dispatch_keyset;
}

// The backward pass of a network, without a graph.
std::vector<at::Tensor> run_backward(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& needs,
    const std::vector<at::Tensor>& grad_hidden,
    std::size_t outputs) {
  if (is_thread_plain() && !is_observed()) {
    if (auto gradients = direct_backward(
            grad_output, saved, activation, needs, grad_hidden)) {
      gradients->resize(outputs);
      return std::move(*gradients);
    }
  }
  const at::AutoDispatchBelowAutograd guard;
  return at_their_places(
      grad_hidden.empty()
          ? operators::backward(grad_output, saved, activation, needs)
          : python::reference_backward(
                grad_output, saved, activation, needs, grad_hidden),
      needs, outputs);
}

std::vector<at::Tensor> unpack_all(
    const std::vector<SavedVariable>& saved,
    const NodePointer& node) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(saved.size());
  for (const SavedVariable& variable : saved) {
    tensors.push_back(variable.unpack(node));
  }
  return tensors;
}

// What a derivative of the backward pass sends to a tensor
// (second_order.reach_of).
enum class Reach {
  nothing,
  zeros, // because only a mask reads the tensor
  numbers,
};

// One for the gradient of y and for each saved tensor.
std::vector<Reach> reach_of(
    const std::string& activation,
    const Needs& needs,
    const variable_list& cotangents) {
  const std::size_t layers = needs.layers();
  std::size_t next = 0;
  const auto take = [&](bool is_result) {
    return is_result && cotangents[next++].defined();
  };
  std::vector<bool> has_tangent(layers + 1), has_weight(layers);
  has_tangent[0] = take(needs.x());
  for (std::size_t l = 0; l < layers; ++l) {
    has_weight[l] = take(needs.weight(l));
  }
  for (std::size_t l = 0; l < layers; ++l) {
    const bool has_bias = take(needs.bias(l));
    has_tangent[l + 1] = has_tangent[l] || has_weight[l] || has_bias;
  }
  const auto numbers_if = [](bool is_reached) {
    return is_reached ? Reach::numbers : Reach::nothing;
  };
  const auto of_input = [&](std::size_t l) {
    const bool is_masked = l > needs.lowest_layer() && has_tangent[l];
    return has_weight[l] ? Reach::numbers
        : is_masked      ? Reach::zeros
                         : Reach::nothing;
  };
  std::vector<Reach> reach{numbers_if(has_tangent[layers])};
  if (needs.reads_input(0)) {
    reach.push_back(of_input(0));
  }
  if (activation != "none" && needs.lowest_layer() < layers) {
    reach.push_back(
        has_tangent[layers] && !has_curvature(activation)
            ? Reach::zeros
            : numbers_if(has_tangent[layers]));
  }
  for (std::size_t l = 0; l < layers; ++l) {
    if (needs.reads_weight(l)) {
      reach.push_back(numbers_if(has_tangent[l]));
    }
  }
  for (std::size_t l = 1; l < layers; ++l) {
    if (needs.reads_input(l)) {
      reach.push_back(of_input(l));
    }
  }
  return reach;
}

class GradientBackward : public torch::autograd::Node {
 public:
  std::string name() const override {
    return "GradientBackward";
  }

  variable_list apply(variable_list&& cotangents) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(autocast_keys());
    bool any = false;
    for (const at::Tensor& cotangent : cotangents) {
      any = any || cotangent.defined();
    }
    if (!any) {
      return variable_list(num_outputs());
    }
    const std::vector<at::Tensor> all = unpack_all(saved_, nullptr);
    const std::vector<bool> requested = requested_outputs();
    if (!is_recording() && is_thread_plain() && !is_observed() &&
        std::none_of(all.begin(), all.end(), carries_tangent) &&
        std::none_of(cotangents.begin(), cotangents.end(), carries_tangent)) {
      if (auto gradients = run_directly(all, cotangents, requested)) {
        return std::move(*gradients);
      }
    }
    return run(cotangents, all, activation_, needs_, requested);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& variable : saved_) {
      variable.reset_data();
    }
  }

  void compiled_args(CompiledNodeArgs& arguments) const override {
    arguments.collect(saved_, false);
    arguments.collect(activation_);
    arguments.collect(needs_);
    arguments.collect(requested_outputs());
  }

  variable_list apply_with_saved(
      const variable_list& inputs,
      SwapSavedVariables& swapped) override {
    swapped.before(saved_);
    PackedArgs arguments;
    arguments.pack(unpack_all(saved_, nullptr));
    arguments.pack(activation_);
    arguments.pack(needs_);
    arguments.pack(requested_outputs());
    const auto function = [](const variable_list& cotangents,
                             const std::vector<at::IValue>& packed) {
      PackedArgs unpacked(packed);
      const auto all = unpacked.unpack<variable_list>();
      const auto activation = unpacked.unpack<std::string>();
      const auto needs = unpacked.unpack<std::string>();
      const auto requested = unpacked.unpack<std::vector<bool>>();
      return run(cotangents, all, activation, needs, requested);
    };
    variable_list result =
        record_function(*this, function, inputs, arguments, swapped);
    swapped.after(saved_);
    return result;
  }

  std::vector<SavedVariable> saved_; // the gradient of y, then what it needed
  std::string activation_, needs_;

 private:
  std::vector<bool> requested_outputs() const {
    std::vector<bool> requested(num_outputs());
    for (std::size_t n = 0; n < requested.size(); ++n) {
      requested[n] = task_should_compute_output(n);
    }
    return requested;
  }

  static variable_list run(
      const variable_list& cotangents,
      const std::vector<at::Tensor>& all,
      const std::string& activation,
      const std::string& needs,
      const std::vector<bool>& requested) {
    return python::backward_vjp(
        all[0], {all.begin() + 1, all.end()}, activation, needs, cotangents,
        requested);
  }

  std::optional<variable_list> run_directly(
      const std::vector<at::Tensor>& all,
      const variable_list& cotangents,
      const std::vector<bool>& requested) const {
    const std::vector<Reach> reach =
        reach_of(activation_, {needs_}, cotangents);
    std::vector<bool> wanted(reach.size());
    bool any = false;
    for (std::size_t n = 0; n < reach.size(); ++n) {
      wanted[n] = requested[n] && reach[n] == Reach::numbers;
      any = any || wanted[n];
    }
    std::optional<variable_list> gradients = variable_list(reach.size());
    if (any) {
      gradients = direct_vjp(
          all[0], {all.begin() + 1, all.end()}, activation_, needs_, cotangents,
          wanted);
    }
    if (!gradients) {
      return std::nullopt;
    }
    const std::size_t first_hidden = all.size() - hidden_count();
    for (std::size_t n = 0; n < reach.size(); ++n) {
      if (requested[n] && reach[n] == Reach::zeros) {
        (*gradients)[n] = n < first_hidden ? at::zeros_like(all[n])
                                           : symbolic_zeros_like(all[n]);
      }
    }
    return gradients;
  }

  // How many of the saved tensors are hidden activations. They come last.
  std::size_t hidden_count() const {
    const Needs needs{needs_};
    std::size_t count = 0;
    for (std::size_t l = 1; l < needs.layers(); ++l) {
      count += needs.reads_input(l);
    }
    return count;
  }
};

// The gradients that reach the outputs of a network.
struct Reached {
  at::Tensor grad_output;
  // Empty if nothing but masks' zeros reaches the hidden activations.
  std::vector<at::Tensor> grad_hidden;
  bool are_zero; // whether nothing but masks' zeros reaches any output
};

// std::nullopt if no gradient reaches any output.
std::optional<Reached> reached_of(
    const variable_list& grads,
    c10::SymIntArrayRef y_sizes) {
  const auto first = std::find_if(
      grads.begin(), grads.end(),
      [](const at::Tensor& grad) { return grad.defined(); });
  if (first == grads.end()) {
    return std::nullopt;
  }
  Reached reached{grads[0], {}, !grads[0].defined()};
  if (!reached.grad_output.defined()) {
    reached.grad_output = at::zeros_symint(y_sizes, first->options());
  }
  if (std::any_of(grads.begin() + 1, grads.end(), [](const at::Tensor& grad) {
        return grad.defined() && !is_symbolic_zero(grad);
      })) {
    for (auto grad = grads.begin() + 1; grad != grads.end(); ++grad) {
      reached.grad_hidden.push_back(
          is_symbolic_zero(*grad) ? at::Tensor() : *grad);
    }
    reached.are_zero = false;
  }
  return reached;
}

class MLPBackward : public torch::autograd::Node {
 public:
  std::string name() const override {
    return "MLPBackward";
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(autocast_keys());
    const std::string needs = requested_needs();
    const std::optional<Reached> reached = reached_of(grads, y_sizes_);
    if (!reached || needs.find('1') == std::string::npos) {
      return variable_list(num_outputs());
    }
    const auto& [grad_output, grad_hidden, are_zero] = *reached;
    const bool is_differentiable = is_recording() ||
        carries_tangent(grad_output) || is_under_a_transform();
    if (!recompute_) {
      const std::vector<at::Tensor> saved = unpacked(needs, is_differentiable);
      if (are_zero && !is_differentiable && is_thread_plain() &&
          std::all_of(saved.begin(), saved.end(), is_finite)) {
        return zeros(needs);
      }
      return backward(
          grad_output, saved, needs, grad_hidden, is_differentiable);
    }
    const Call call =
        call_of(unpack_all(saved_, nullptr), layers_, activation_);
    if (!is_differentiable && grad_hidden.empty()) {
      return run_recompute_backward(grad_output, call, needs);
    }
    return backward(
        grad_output, computed_again(call, needs), needs, grad_hidden,
        is_differentiable);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& variable : saved_) {
      variable.reset_data();
    }
  }

  void compiled_args(CompiledNodeArgs& arguments) const override {
    arguments.collect(saved_, true);
    arguments.collect(activation_);
    arguments.collect(requested_needs());
    arguments.collect(recompute_);
  }

  variable_list apply_with_saved(
      const variable_list& inputs,
      SwapSavedVariables& swapped) override {
    const std::string needs = requested_needs();
    swapped.before(saved_);
    std::vector<at::Tensor> saved = unpack_all(saved_, getptr());
    swapped.after(saved_);
    if (!recompute_) {
      saved = wanted_of(std::move(saved), needs);
    }
    PackedArgs arguments;
    arguments.pack(saved);
    arguments.pack(activation_);
    arguments.pack(needs);
    arguments.pack(recompute_);
    arguments.pack(static_cast<int64_t>(num_outputs()));
    arguments.pack(std::vector<c10::SymInt>(y_sizes_.begin(), y_sizes_.end()));
    return record_function(
        *this, backward_in_a_graph, inputs, arguments, swapped);
  }

  // Saves what the needed gradients depend on. The outputs have their places in
  // the graph already.
  void save(const Call& call, const ForwardResult& result) {
    if (recompute_) {
      saved_.reserve(1 + call.weights.size() + call.biases.size());
      saved_.emplace_back(call.x, false);
      for (const at::Tensor& weight : call.weights) {
        saved_.emplace_back(weight, false);
      }
      for (const at::Tensor& bias : call.biases) {
        saved_.emplace_back(bias, false);
      }
      return;
    }
    const std::vector<bool> kept = is_kept({needs_}, activation_ != "none");
    saved_.reserve(kept.size());
    if (kept[0]) {
      saved_.emplace_back(call.x, false);
    }
    if (kept[1]) {
      saved_.emplace_back(result.y, true);
    }
    for (std::size_t l = 0; l < layers_; ++l) {
      if (kept[2 + l]) {
        saved_.emplace_back(call.weights[l], false);
      }
    }
    for (std::size_t l = 1; l < layers_; ++l) {
      if (kept[1 + layers_ + l]) {
        saved_.emplace_back(result.hidden[l - 1], has_hidden_outputs_);
      }
    }
  }

  std::string activation_, needs_;
  std::size_t layers_ = 0;
  bool recompute_ = false;
  // Whether the caller gets the hidden activations, each with its place in the
  // graph. Otherwise `as_output` gives them their places when it is needed.
  bool has_hidden_outputs_ = false;
  c10::SymDimVector y_sizes_;
  std::vector<SavedVariable> saved_;

 private:
  // The needs of this backward pass. torch.autograd.grad(y, x) asks for the
  // gradient of x alone.
  std::string requested_needs() const {
    std::string needs = needs_;
    for (std::size_t n = 0; n < needs.size(); ++n) {
      if (needs[n] == '1' && !task_should_compute_output(n)) {
        needs[n] = '0';
      }
    }
    return needs;
  }

  // The gradients if those of the outputs are 0. That is so unless an operand
  // is infinite or NaN.
  variable_list zeros(const std::string& needs) const {
    variable_list gradients(num_outputs());
    for (std::size_t n = 0; n < needs.size(); ++n) {
      if (needs[n] == '1') {
        const auto& [node, input] = next_edge(n);
        gradients[n] = node->input_metadata(input).zeros_like();
      }
    }
    return gradients;
  }

  // Those of `saved` that these needs depend on.
  std::vector<at::Tensor> wanted_of(
      std::vector<at::Tensor> saved,
      const std::string& needs) const {
    const std::vector<bool> kept = is_kept({needs_}, activation_ != "none");
    const std::vector<bool> wanted = is_kept({needs}, activation_ != "none");
    std::vector<at::Tensor> result;
    result.reserve(saved.size());
    std::size_t next = 0;
    for (std::size_t n = 0; n < kept.size(); ++n) {
      if (kept[n] && wanted[n]) {
        result.push_back(std::move(saved[next]));
      }
      next += kept[n];
    }
    return result;
  }

  // The saved tensors that these needs depend on. With a graph, the hidden
  // activations are outputs of this node.
  std::vector<at::Tensor> unpacked(
      const std::string& needs,
      bool is_differentiable) {
    std::vector<at::Tensor> all = unpack_all(saved_, getptr());
    if (is_differentiable && !has_hidden_outputs_ && is_recording()) {
      const std::vector<bool> kept = is_kept({needs_}, activation_ != "none");
      std::size_t next = all.size();
      for (std::size_t l = layers_; l-- > 1;) {
        if (kept[1 + layers_ + l]) {
          --next;
          all[next] = as_output(all[next], l);
        }
      }
    }
    return wanted_of(std::move(all), needs);
  }

  // A hidden activation a_l with its place in the graph.
  at::Tensor as_output(const at::Tensor& hidden, std::size_t l) {
    return torch::autograd::make_variable(
        hidden, torch::autograd::Edge(getptr(), static_cast<uint32_t>(l)));
  }

  variable_list backward(
      const at::Tensor& grad_output,
      const std::vector<at::Tensor>& saved,
      const std::string& needs,
      const std::vector<at::Tensor>& grad_hidden,
      bool is_differentiable) const {
    if (!is_differentiable) {
      return run_backward(
          grad_output, saved, activation_, needs, grad_hidden, num_outputs());
    }
    if (grad_hidden.empty() && is_thread_plain() &&
        needs_gradient(grad_output, saved) && !carries_tangent(grad_output) &&
        std::none_of(saved.begin(), saved.end(), carries_tangent)) {
      return at_their_places(
          recorded_backward(grad_output, saved, activation_, needs), needs,
          num_outputs());
    }
    const python::UsingExtension guard; // as in the forward pass
    return at_their_places(
        grad_hidden.empty()
            ? operators::backward(grad_output, saved, activation_, needs)
            : python::reference_backward(
                  grad_output, saved, activation_, needs, grad_hidden),
        needs, num_outputs());
  }

  variable_list run_recompute_backward(
      const at::Tensor& grad_output,
      const Call& call,
      const std::string& needs) const {
    if (is_thread_plain() && !is_observed()) {
      if (auto gradients =
              direct_recompute_backward(grad_output, call, needs)) {
        gradients->resize(num_outputs());
        return std::move(*gradients);
      }
    }
    const at::AutoDispatchBelowAutograd guard;
    return at_their_places(
        operators::recompute_backward(grad_output, call, needs), needs,
        num_outputs());
  }

  // What a forward pass would have saved for these needs.
  static std::vector<at::Tensor> computed_again(
      const Call& call,
      const std::string& needs) {
    const python::UsingExtension guard;
    auto [y, hidden] = operators::forward(call, true);
    std::vector<at::Tensor> all{call.x, y};
    all.insert(all.end(), call.weights.begin(), call.weights.end());
    all.insert(all.end(), hidden.begin(), hidden.end());
    const std::vector<bool> kept = is_kept({needs}, call.activation != "none");
    std::vector<at::Tensor> saved;
    for (std::size_t n = 0; n < all.size(); ++n) {
      if (kept[n]) {
        saved.push_back(std::move(all[n]));
      }
    }
    return saved;
  }

  // The call that `saved` (x, *weights, *biases) is of.
  static Call call_of(
      const std::vector<at::Tensor>& saved,
      std::size_t layers,
      const std::string& activation) {
    const auto first_bias = saved.begin() + 1 + layers;
    return {
        saved[0],
        {saved.begin() + 1, first_bias},
        {first_bias, saved.end()},
        activation,
        true};
  }

  // The backward pass as a function of what `apply_with_saved` packs.
  static variable_list backward_in_a_graph(
      const variable_list& grads,
      const std::vector<at::IValue>& packed) {
    PackedArgs arguments(packed);
    const auto saved = arguments.unpack<variable_list>();
    const auto activation = arguments.unpack<std::string>();
    const auto needs = arguments.unpack<std::string>();
    const auto recompute = arguments.unpack<bool>();
    const auto outputs = arguments.unpack<int64_t>();
    const auto y_sizes = arguments.unpack<std::vector<c10::SymInt>>();
    const auto reached = reached_of(grads, y_sizes);
    if (!reached || needs.find('1') == std::string::npos) {
      return variable_list(outputs);
    }
    const auto& [grad_output, grad_hidden, are_zero] = *reached;
    std::vector<at::Tensor> gradients;
    if (recompute && grad_hidden.empty()) {
      gradients = operators::recompute_backward(
          grad_output, call_of(saved, needs.size() / 2, activation), needs);
    } else {
      const std::vector<at::Tensor> operands = recompute
          ? computed_again(call_of(saved, needs.size() / 2, activation), needs)
          : saved;
      gradients = grad_hidden.empty()
          ? operators::backward(grad_output, operands, activation, needs)
          : python::reference_backward(
                grad_output, operands, activation, needs, grad_hidden);
    }
    return at_their_places(std::move(gradients), needs, outputs);
  }
};

// The forward pass without a graph at this level.
ForwardResult run_forward(const Call& call, bool save_hidden) {
  if (is_thread_plain() && !is_observed()) {
    if (auto result = direct_forward(call, save_hidden)) {
      return std::move(*result);
    }
  }
  const at::AutoDispatchBelowAutograd guard;
  auto [y, hidden] = operators::forward(call, save_hidden);
  return {std::move(y), std::move(hidden)};
}

ForwardResult recorded(const Call& call, bool has_hidden_outputs) {
  ForwardResult result =
      run_forward(call, !call.recompute || has_hidden_outputs);
  auto node = make_node<MLPBackward>();
  torch::autograd::edge_list edges;
  edges.reserve(1 + 2 * call.weights.size());
  const auto add_edge = [&](const at::Tensor& tensor) {
    edges.push_back(
        tensor.requires_grad() ? torch::autograd::impl::gradient_edge(tensor)
                               : torch::autograd::Edge());
  };
  add_edge(call.x);
  for (const at::Tensor& weight : call.weights) {
    add_edge(weight);
  }
  for (const at::Tensor& bias : call.biases) {
    add_edge(bias);
  }
  edges.resize(1 + 2 * call.weights.size());
  node->set_next_edges(std::move(edges));
  node->activation_ = call.activation;
  node->needs_ = needs_of(call);
  node->layers_ = call.weights.size();
  node->recompute_ = call.recompute;
  node->has_hidden_outputs_ = has_hidden_outputs;
  node->y_sizes_ = result.y.sym_sizes();
  torch::autograd::set_history(result.y, node);
  for (const at::Tensor& hidden : result.hidden) {
    if (has_hidden_outputs) {
      torch::autograd::set_history(hidden, node);
    } else {
      node->add_input_metadata(hidden);
    }
  }
  node->save(call, result);
  return result;
}

} // namespace

bool needs_gradient(const Call& call) {
  return is_recording() &&
      call.any([](const at::Tensor& t) { return t.requires_grad(); });
}

bool needs_gradient(
    const at::Tensor& tensor,
    const std::vector<at::Tensor>& others) {
  return is_recording() &&
      (tensor.requires_grad() ||
       std::any_of(others.begin(), others.end(), [](const at::Tensor& other) {
         return other.requires_grad();
       }));
}

at::Tensor recorded_relu_mlp(const Call& call) {
  return recorded(call, false).y;
}

ForwardResult recorded_forward(const Call& call) {
  return recorded(call, true);
}

std::vector<at::Tensor> recorded_backward(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& needs) {
  variable_list all =
      run_backward(grad_output, saved, activation, needs, {}, needs.size());
  auto node = make_node<GradientBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(grad_output, saved));
  node->activation_ = activation;
  node->needs_ = needs;
  node->saved_.reserve(1 + saved.size());
  node->saved_.emplace_back(grad_output, false);
  for (const at::Tensor& tensor : saved) {
    node->saved_.emplace_back(tensor, false);
  }
  std::vector<at::Tensor> gradients;
  for (at::Tensor& gradient : all) {
    if (gradient.defined()) {
      torch::autograd::set_history(gradient, node);
      gradients.push_back(std::move(gradient));
    }
  }
  return gradients;
}

} // namespace relu_mlp::node
