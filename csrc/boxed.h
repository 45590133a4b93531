// The operators between PyTorch's stack and the passes of a device: the checks
// of the arguments, and the way from PyTorch's tensors to a pass and back.
// relu_mlp/reference.py makes the same checks, in the same words, where this
// library is not used.
#pragma once

#include <algorithm>

#include "passes.h"
#include "stack.h"

namespace relu_mlp {

// A shape as Python prints it.
inline std::string shape(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '(';
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    text << (d ? ", " : "") << sizes[d];
  }
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

inline std::string shape(const Tensor& tensor) {
  return shape({tensor.sizes(), tensor.sizes() + tensor.dim()});
}

// A dtype's name in Python.
inline std::string dtype_name(const Tensor& tensor) {
  const std::pair<int32_t, const char*> names[] = {
      {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_float32(), "float32"},
      {aoti_torch_dtype_bfloat16(), "bfloat16"},
      {aoti_torch_dtype_float16(), "float16"},
      {aoti_torch_dtype_int64(), "int64"},
      {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int16(), "int16"},
      {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_uint8(), "uint8"},
      {aoti_torch_dtype_uint16(), "uint16"},
      {aoti_torch_dtype_uint32(), "uint32"},
      {aoti_torch_dtype_uint64(), "uint64"},
      {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_complex32(), "complex32"},
      {aoti_torch_dtype_complex64(), "complex64"},
      {aoti_torch_dtype_complex128(), "complex128"},
      {aoti_torch_dtype_float8_e5m2(), "float8_e5m2"},
      {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn"},
      {aoti_torch_dtype_float8_e5m2fnuz(), "float8_e5m2fnuz"},
      {aoti_torch_dtype_float8_e4m3fnuz(), "float8_e4m3fnuz"}};
  for (const auto& [number, name] : names) {
    if (number == tensor.dtype()) {
      return name;
    }
  }
  return "another dtype";
}

template <typename... Name>
void check_like_x(const Tensor& tensor, const Tensor& x, const Name&... name) {
  if (tensor.dtype() != x.dtype()) {
    fail(name..., " must be ", dtype_name(x), " like x, got ",
         dtype_name(tensor));
  }
}

// A device's name in Python.
inline std::string device_name(const Tensor& tensor) {
  const int32_t type = tensor.device_type();
  if (type == aoti_torch_device_type_cuda()) {
    return "cuda:" + std::to_string(tensor.device_index());
  }
  return type == aoti_torch_device_type_cpu() ? "cpu"
      : type == aoti_torch_device_type_meta() ? "meta"
                                              : "another device";
}

inline bool are_together(const Tensor& a, const Tensor& b) {
  return a.device_type() == b.device_type() &&
      a.device_index() == b.device_index();
}

template <typename... Name>
void check_device(const Tensor& tensor, const Tensor& x, const Name&... name) {
  if (!are_together(tensor, x)) {
    fail(name..., " must be on ", device_name(x), " like x, got ",
         device_name(tensor));
  }
}

// A missing bias may lie on the CPU, too, but nowhere else: it may be the reason why
// the dispatcher sends the call to this device, on which x then is not.
inline void check_devices(
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases) {
  for (std::size_t l = 0; l < weights.size(); ++l) {
    check_device(weights[l], x, "weights[", l, "]");
    if (!biases.empty() &&
        (biases[l].numel() > 0 ||
         biases[l].device_type() != aoti_torch_device_type_cpu())) {
      check_device(biases[l], x, "biases[", l, "]");
    }
  }
}

template <typename... Name>
void check_storage(const Tensor& tensor, const Name&... name) {
  if (!is_covered(tensor)) {
    fail(name..., " must have a storage with all its elements: shape ",
         shape(tensor), ", strides ",
         shape({tensor.strides(), tensor.strides() + tensor.dim()}),
         " and storage offset ", tensor.storage_offset(),
         " are out of bounds for storage of ", tensor.storage_size(),
         " bytes, which resize_ may have freed");
  }
}

inline void check_layers(
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases) {
  if (x.dim() < 1) {
    fail("x must have at least one dimension, got shape ()");
  }
  const int32_t dtype = x.dtype();
  if (dtype != aoti_torch_dtype_float32() &&
      dtype != aoti_torch_dtype_float64() &&
      dtype != aoti_torch_dtype_bfloat16() &&
      dtype != aoti_torch_dtype_float16()) {
    fail("x must be float64, float32, bfloat16 or float16, got ",
         dtype_name(x));
  }
  check_storage(x, "x");
  if (weights.empty()) {
    fail("weights must have at least one entry, got none");
  }
  if (!biases.empty() && biases.size() != weights.size()) {
    fail("biases must have one entry for each of the ", weights.size(),
         " weights, got ", biases.size());
  }
  int64_t features = x.size(x.dim() - 1);
  for (std::size_t l = 0; l < weights.size(); ++l) {
    const Tensor& weight = weights[l];
    if (weight.dim() != 2 || weight.size(1) != features) {
      fail("weights[", l, "] must have shape (out_features, ", features,
           ") to follow ", l ? "weights[" + std::to_string(l - 1) + "]" : "x",
           ", got ", shape(weight));
    }
    check_like_x(weight, x, "weights[", l, "]");
    check_storage(weight, "weights[", l, "]");
    features = weight.size(0);
    if (!biases.empty() && biases[l].numel() > 0) {
      const Tensor& bias = biases[l];
      if (bias.dim() != 1 || bias.size(0) != features) {
        fail("biases[", l, "] must have shape (", features, ",), got ",
             shape(bias));
      }
      check_like_x(bias, x, "biases[", l, "]");
      check_storage(bias, "biases[", l, "]");
    }
  }
}

inline Activation parse_activation(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "sigmoid") return Activation::sigmoid;
  if (name == "tanh") return Activation::tanh;
  fail("output_activation must be 'none', 'relu', 'sigmoid' or 'tanh', got '",
       name, "'");
}

inline Loss parse_loss(const std::string& name) {
  if (name == "sse") return Loss::sse;
  if (name == "half_sse") return Loss::half_sse;
  if (name == "mse") return Loss::mse;
  fail("loss must be 'sse', 'half_sse' or 'mse', got '", name, "'");
}

template <const Passes& on>
ForwardResult checked_forward(
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases,
    const std::string& output_activation,
    bool save_hidden) {
  check_layers(x, weights, biases);
  if (on.checks_devices) {
    check_devices(x, weights, biases);
  }
  Tensor holder;
  ForwardResult result = on.forward(
      as_matrix(x, holder), weights, biases,
      parse_activation(output_activation), save_hidden);
  result.y = with_leading_sizes(std::move(result.y), x);
  return result;
}

template <const Passes& on>
void forward(StableIValue* stack) {
  const auto x = take<Tensor>(stack[0]);
  const auto weights = take<std::vector<Tensor>>(stack[1]);
  const auto biases = take<std::vector<Tensor>>(stack[2]);
  const auto output_activation = take<std::string>(stack[3]);
  const bool save_hidden = take<bool>(stack[4]);
  ForwardResult result =
      checked_forward<on>(x, weights, biases, output_activation, save_hidden);
  stack[0] = give(std::move(result.y));
  stack[1] = give(std::move(result.hidden));
}

// The operator `relu_mlp`; its derivative is registered in Python.
template <const Passes& on>
void differentiable(StableIValue* stack) {
  const auto x = take<Tensor>(stack[0]);
  const auto weights = take<std::vector<Tensor>>(stack[1]);
  const auto biases = take<std::vector<Tensor>>(stack[2]);
  const auto output_activation = take<std::string>(stack[3]);
  stack[0] = give(
      checked_forward<on>(x, weights, biases, output_activation, false).y);
}

inline void check_output_like(
    const char* name,
    const Tensor& tensor,
    const Tensor& x,
    const std::vector<Tensor>& weights) {
  std::vector<int64_t> expected(x.sizes(), x.sizes() + x.dim());
  expected.back() = weights.back().size(0);
  if (!std::equal(expected.begin(), expected.end(), tensor.sizes(),
                  tensor.sizes() + tensor.dim())) {
    fail(name, " must have the output's shape ", shape(expected), ", got ",
         shape(tensor));
  }
  check_like_x(tensor, x, name);
  check_storage(tensor, name);
}

inline void check_operand(
    const Tensor& tensor,
    const Tensor& grad_output,
    int64_t rows,
    int64_t cols,
    const char* name,
    std::size_t l) {
  if (tensor.dim() != 2 || tensor.size(0) != rows || tensor.size(1) != cols ||
      tensor.dtype() != grad_output.dtype()) {
    fail("relu_mlp::backward: ", name, " of layer ", l, " must be ",
         dtype_name(grad_output), " of shape (", rows, ", ", cols, "), got ",
         dtype_name(tensor), " of shape ", shape(tensor));
  }
}

// The tensors of `saved` at the places where the backward pass looks for them.
// Only autograd.py calls the operator, with what its Plan kept; the checks keep
// a mistake there from reading memory that is not ours. The holders keep what
// had to be made a matrix.
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
      fail("relu_mlp::backward: needs ", needs.flags, " asks for more than the ",
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
  result.inputs.push_back(next_matrix_if(needs.weight(0), x_holder));
  result.y = next_matrix_if(
      lowest < layers && output_activation != Activation::none, y_holder);
  for (std::size_t l = 0; l < layers; ++l) {
    result.weights.push_back(next_if(needs.propagation_through(l)));
  }
  for (std::size_t l = 1; l < layers; ++l) {
    result.inputs.push_back(next_if(l > lowest || needs.weight(l)));
  }
  if (next != saved.size()) {
    fail("relu_mlp::backward: needs ", needs.flags, " asks for ", next,
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
      fail("relu_mlp::backward: saved must have matrices, got shape ",
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

// What both backward operators check of needs and grad_output.
inline void check_backward(
    const char* name,
    const std::string& flags,
    const Tensor& grad_output) {
  if (flags.size() < 3 || flags.size() % 2 == 0 ||
      flags.find_first_not_of("01") != std::string::npos) {
    fail("relu_mlp::", name, ": needs must be 1 + 2 L characters '0' or '1', "
         "got '", flags, "'");
  }
  if (grad_output.dim() < 1) {
    fail("relu_mlp::", name, ": grad_output must have at least one dimension, "
         "got shape ()");
  }
}

// The gradients that were asked for, that of x in the shape of x.
inline StableIValue give_needed(
    Gradients gradients,
    const Needs& needs,
    const Tensor& grad_output) {
  if (needs.x()) {
    gradients[0] = with_leading_sizes(std::move(gradients[0]), grad_output);
  }
  std::erase_if(gradients, [](const Tensor& grad) { return !grad.get(); });
  return give(std::move(gradients));
}

template <const Passes& on>
void backward(StableIValue* stack) {
  const auto grad_output = take<Tensor>(stack[0]);
  const auto saved = take<std::vector<Tensor>>(stack[1]);
  const auto output_activation = take<std::string>(stack[2]);
  const auto flags = take<std::string>(stack[3]);
  check_backward("backward", flags, grad_output);
  const Needs needs{flags};
  if (needs.lowest_layer() == needs.layers()) {
    stack[0] = give(std::vector<Tensor>{});
    return;
  }
  check_storage(grad_output, "relu_mlp::backward: grad_output");
  for (std::size_t n = 0; n < saved.size(); ++n) {
    if (on.checks_devices && !are_together(saved[n], grad_output)) {
      fail("relu_mlp::backward: saved[", n, "] must be on ",
           device_name(grad_output), " like grad_output, got ",
           device_name(saved[n]));
    }
    check_storage(saved[n], "relu_mlp::backward: saved[", n, "]");
  }
  const Activation activation = parse_activation(output_activation);
  Tensor grad_holder, x_holder, y_holder;
  const Tensor& grad_matrix = as_matrix(grad_output, grad_holder);
  const Saved operands =
      unpack(saved, grad_matrix, activation, needs, x_holder, y_holder);
  stack[0] = give_needed(
      on.backward(grad_matrix, operands, activation, needs), needs,
      grad_output);
}

template <const Passes& on>
void recompute_backward(StableIValue* stack) {
  const auto grad_output = take<Tensor>(stack[0]);
  const auto x = take<Tensor>(stack[1]);
  const auto weights = take<std::vector<Tensor>>(stack[2]);
  const auto biases = take<std::vector<Tensor>>(stack[3]);
  const auto output_activation = take<std::string>(stack[4]);
  const auto flags = take<std::string>(stack[5]);
  check_layers(x, weights, biases);
  check_backward("recompute_backward", flags, grad_output);
  const Needs needs{flags};
  if (needs.layers() != weights.size()) {
    fail("relu_mlp::recompute_backward: needs must have ",
         1 + 2 * weights.size(), " characters, got '", flags, "'");
  }
  check_output_like("grad_output", grad_output, x, weights);
  if (on.checks_devices) {
    check_devices(x, weights, biases);
    check_device(grad_output, x, "grad_output");
  }
  Tensor grad_holder, x_holder;
  stack[0] = give_needed(
      on.recompute_backward(
          as_matrix(grad_output, grad_holder), as_matrix(x, x_holder), weights,
          biases, parse_activation(output_activation), needs),
      needs, grad_output);
}

template <const Passes& on>
void loss_and_grads(StableIValue* stack) {
  const auto x = take<Tensor>(stack[0]);
  const auto target = take<Tensor>(stack[1]);
  const auto weights = take<std::vector<Tensor>>(stack[2]);
  const auto biases = take<std::vector<Tensor>>(stack[3]);
  const auto loss = take<std::string>(stack[4]);
  const auto output_activation = take<std::string>(stack[5]);
  check_layers(x, weights, biases);
  check_output_like("target", target, x, weights);
  if (on.checks_devices) {
    check_devices(x, weights, biases);
    check_device(target, x, "target");
  }

  Tensor x_holder, target_holder;
  LossAndGradients result = on.loss_and_grads(
      as_matrix(x, x_holder), as_matrix(target, target_holder), weights,
      biases, parse_loss(loss), parse_activation(output_activation));

  std::vector<Tensor>& gradients = result.gradients;
  gradients.erase(gradients.begin()); // that of x
  gradients.resize(weights.size() + biases.size());
  for (Tensor& gradient : gradients) {
    if (!gradient.get()) {
      gradient = empty<1>({0}, x);
    }
  }
  stack[0] = give(std::move(result.loss));
  stack[1] = give(std::move(gradients));
}

inline void define_passes(torch::stable::detail::StableLibrary& m) {
  m.def(
      "relu_mlp(Tensor x, Tensor[] weights, Tensor[] biases, "
      "str output_activation=\"none\") -> Tensor");
  m.def(
      "forward(Tensor x, Tensor[] weights, Tensor[] biases, "
      "str output_activation, bool save_hidden) -> (Tensor, Tensor[])");
  // saved: of x, y, the weights and the hidden activations, in this order, what
  // the wanted gradients depend on. needs: '0' or '1' for x, every weight and
  // every bias. The result has the wanted gradients in that order, no others.
  m.def(
      "backward(Tensor grad_output, Tensor[] saved, str output_activation, "
      "str needs) -> Tensor[]");
  // The same from x and the parameters, for those who kept nothing else.
  m.def(
      "recompute_backward(Tensor grad_output, Tensor x, Tensor[] weights, "
      "Tensor[] biases, str output_activation, str needs) -> Tensor[]");
  // The gradients are those of the weights, then one for every entry of
  // biases: without elements, where the entry has none.
  m.def(
      "loss_and_grads(Tensor x, Tensor target, Tensor[] weights, "
      "Tensor[] biases, str loss, str output_activation) "
      "-> (Tensor, Tensor[])");
}

template <const Passes& on>
void register_passes(torch::stable::detail::StableLibrary& m) {
  m.impl("relu_mlp", &guarded<&differentiable<on>>);
  m.impl("forward", &guarded<&forward<on>>);
  m.impl("backward", &guarded<&backward<on>>);
  m.impl("recompute_backward", &guarded<&recompute_backward<on>>);
  m.impl("loss_and_grads", &guarded<&loss_and_grads<on>>);
}

} // namespace relu_mlp
