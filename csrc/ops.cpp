// The operators: their schemas, the checks of their arguments, and the way
// from PyTorch's tensors to the kernels and back. relu_mlp/reference.py makes
// the same checks, in the same words, where this library is not used.

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/mlp.h"
#include "cpu/strategy.h"
#include "stack.h"
#include "tensor.h"

namespace relu_mlp {
namespace {

// A shape as Python prints it.
std::string shape(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '(';
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    text << (d ? ", " : "") << sizes[d];
  }
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

std::string shape(const Tensor& tensor) {
  return shape({tensor.sizes(), tensor.sizes() + tensor.dim()});
}

// A dtype's name in Python.
std::string dtype_name(const Tensor& tensor) {
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

void check_layers(
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
    features = weight.size(0);
    if (!biases.empty() && biases[l].numel() > 0) {
      const Tensor& bias = biases[l];
      if (bias.dim() != 1 || bias.size(0) != features) {
        fail("biases[", l, "] must have shape (", features, ",), got ",
             shape(bias));
      }
      check_like_x(bias, x, "biases[", l, "]");
    }
  }
}

Activation parse_activation(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "sigmoid") return Activation::sigmoid;
  if (name == "tanh") return Activation::tanh;
  fail("output_activation must be 'none', 'relu', 'sigmoid' or 'tanh', got '",
       name, "'");
}

Loss parse_loss(const std::string& name) {
  if (name == "sse") return Loss::sse;
  if (name == "half_sse") return Loss::half_sse;
  if (name == "mse") return Loss::mse;
  fail("loss must be 'sse', 'half_sse' or 'mse', got '", name, "'");
}

cpu::ForwardResult checked_forward(
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases,
    const std::string& output_activation,
    bool save_hidden) {
  check_layers(x, weights, biases);
  Tensor holder;
  cpu::ForwardResult result = cpu::forward(
      as_matrix(x, holder), weights, biases,
      parse_activation(output_activation), save_hidden);
  result.y = with_leading_sizes(std::move(result.y), x);
  return result;
}

void forward(StableIValue* stack, uint64_t, uint64_t) {
  const auto x = take<Tensor>(stack[0]);
  const auto weights = take<std::vector<Tensor>>(stack[1]);
  const auto biases = take<std::vector<Tensor>>(stack[2]);
  const auto output_activation = take<std::string>(stack[3]);
  const bool save_hidden = take<bool>(stack[4]);
  cpu::ForwardResult result =
      checked_forward(x, weights, biases, output_activation, save_hidden);
  stack[0] = give(std::move(result.y));
  stack[1] = give(std::move(result.hidden));
}

// The operator `relu_mlp`; its derivative is registered in Python.
void differentiable(StableIValue* stack, uint64_t, uint64_t) {
  const auto x = take<Tensor>(stack[0]);
  const auto weights = take<std::vector<Tensor>>(stack[1]);
  const auto biases = take<std::vector<Tensor>>(stack[2]);
  const auto output_activation = take<std::string>(stack[3]);
  stack[0] = give(
      checked_forward(x, weights, biases, output_activation, false).y);
}

void check_output_like(
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
}

void check_operand(
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
cpu::Saved unpack(
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

  cpu::Saved result;
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
void check_backward(
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
StableIValue give_needed(
    cpu::Gradients gradients,
    const Needs& needs,
    const Tensor& grad_output) {
  if (needs.x()) {
    gradients[0] = with_leading_sizes(std::move(gradients[0]), grad_output);
  }
  std::erase_if(gradients, [](const Tensor& grad) { return !grad.get(); });
  return give(std::move(gradients));
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
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
  const Activation activation = parse_activation(output_activation);
  Tensor grad_holder, x_holder, y_holder;
  const Tensor& grad_matrix = as_matrix(grad_output, grad_holder);
  const cpu::Saved operands =
      unpack(saved, grad_matrix, activation, needs, x_holder, y_holder);
  stack[0] = give_needed(
      cpu::backward(grad_matrix, operands, activation, needs), needs,
      grad_output);
}

void recompute_backward(StableIValue* stack, uint64_t, uint64_t) {
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
  Tensor grad_holder, x_holder;
  stack[0] = give_needed(
      cpu::recompute_backward(
          as_matrix(grad_output, grad_holder), as_matrix(x, x_holder), weights,
          biases, parse_activation(output_activation), needs),
      needs, grad_output);
}

void loss_and_grads(StableIValue* stack, uint64_t, uint64_t) {
  const auto x = take<Tensor>(stack[0]);
  const auto target = take<Tensor>(stack[1]);
  const auto weights = take<std::vector<Tensor>>(stack[2]);
  const auto biases = take<std::vector<Tensor>>(stack[3]);
  const auto loss = take<std::string>(stack[4]);
  const auto output_activation = take<std::string>(stack[5]);
  check_layers(x, weights, biases);
  check_output_like("target", target, x, weights);

  Tensor x_holder, target_holder;
  cpu::LossAndGradients result = cpu::loss_and_grads(
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

// What the compiler was told, for relu_mlp.build_info(): lines of "key: value".
std::string build_info() {
  std::ostringstream text;
#if defined(__clang__)
  text << "compiler: Clang " << __clang_version__ << '\n';
#elif defined(__GNUC__)
  text << "compiler: GCC " << __VERSION__ << '\n';
#elif defined(_MSC_VER)
  text << "compiler: MSVC " << _MSC_VER << '\n';
#endif
  text << "oldest_torch: " << ((TORCH_TARGET_VERSION >> 56) & 0xff) << '.'
       << ((TORCH_TARGET_VERSION >> 48) & 0xff) << '\n';
  text << "instruction_sets:";
  for (const std::string& name : cpu::compiled_instruction_sets()) {
    text << ' ' << name;
  }
  text << "\ninstruction_set: " << cpu::chosen_instruction_set().name << '\n';
  return text.str();
}

// For tests: which instruction sets there are to choose from, and the choice.
std::string supported_instruction_sets() {
  std::string text;
  for (const std::string& name : cpu::supported_instruction_sets()) {
    text += (text.empty() ? "" : " ") + name;
  }
  return text;
}

void choose_instruction_set(std::string name) {
  if (!cpu::choose_instruction_set(name)) {
    fail("name must be one of '", supported_instruction_sets(), "', got '",
         name, "'");
  }
}

// For tests: how a call would be served, as lines of "key: value".
std::string strategy(
    int64_t rows,
    std::vector<int64_t> widths,
    bool is_narrow) {
  const cpu::Strategy s = cpu::choose_strategy(rows, widths, is_narrow);
  std::ostringstream text;
  text << "products: " << (s.library ? "library" : "own") << "\nblock: "
       << s.block << "\nchunk: " << s.chunk << "\nchunks: " << s.chunks << '\n';
  return text.str();
}

} // namespace
} // namespace relu_mlp

// relu_mlp/ops.py has the same schemas, for the case that this library is not
// there.
STABLE_TORCH_LIBRARY(relu_mlp, m) {
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
  m.def("_build_info() -> str");
  m.def("_supported_instruction_sets() -> str");
  m.def("_choose_instruction_set(str name) -> ()");
  m.def("_strategy(int rows, int[] widths, bool is_narrow) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(relu_mlp, CompositeExplicitAutograd, m) {
  m.impl("_build_info", TORCH_BOX(&relu_mlp::build_info));
  m.impl(
      "_supported_instruction_sets",
      TORCH_BOX(&relu_mlp::supported_instruction_sets));
  m.impl(
      "_choose_instruction_set", TORCH_BOX(&relu_mlp::choose_instruction_set));
  m.impl("_strategy", TORCH_BOX(&relu_mlp::strategy));
}

STABLE_TORCH_LIBRARY_IMPL(relu_mlp, CPU, m) {
  m.impl("relu_mlp", &relu_mlp::differentiable);
  m.impl("forward", &relu_mlp::forward);
  m.impl("backward", &relu_mlp::backward);
  m.impl("recompute_backward", &relu_mlp::recompute_backward);
  m.impl("loss_and_grads", &relu_mlp::loss_and_grads);
}
