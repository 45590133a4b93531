// The operators: their schemas, the checks of their arguments, and the way
// from PyTorch's tensors to the kernels and back. relu_mlp/reference.py makes
// the same checks, in the same words, where this library is not used.

#include "cpu/mlp.h"
#include "tensor.h"

namespace relu_mlp {
namespace {

// A shape as Python prints it.
template <typename Sizes>
std::string shape_of(const Sizes& sizes) {
  std::ostringstream text;
  text << '(';
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    text << (d ? ", " : "") << sizes[d];
  }
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

std::string shape(const Tensor& tensor) {
  return shape_of(tensor.sizes());
}

// A dtype's name in Python. The shim's numbers are compared, because the
// header-only enumeration knows fewer dtypes than a PyTorch that is newer.
std::string dtype_name(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
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
      {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_complex64(), "complex64"},
      {aoti_torch_dtype_complex128(), "complex128"}};
  for (const auto& [number, name] : names) {
    if (number == dtype) {
      return name;
    }
  }
  return "another dtype";
}

int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

template <typename... Name>
void check_like_x(const Tensor& tensor, const Tensor& x, const Name&... name) {
  if (dtype_of(tensor) != dtype_of(x)) {
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
  const int32_t dtype = dtype_of(x);
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

std::tuple<Tensor, std::vector<Tensor>> forward(
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases,
    const std::string& output_activation,
    bool save_hidden) {
  check_layers(x, weights, biases);
  cpu::ForwardResult result = cpu::forward(
      as_matrix(x), weights, biases, parse_activation(output_activation),
      save_hidden);
  return {with_leading_sizes(result.y, x), std::move(result.hidden)};
}

// `relu_mlp` is the namespace's name already.
Tensor differentiable(
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases,
    const std::string& output_activation) {
  return std::get<0>(forward(x, weights, biases, output_activation, false));
}

void check_operand(
    const Tensor& tensor,
    const Tensor& grad_output,
    int64_t rows,
    int64_t cols,
    const char* name,
    std::size_t l) {
  if (tensor.dim() != 2 || tensor.size(0) != rows || tensor.size(1) != cols ||
      dtype_of(tensor) != dtype_of(grad_output)) {
    fail("relu_mlp::backward: ", name, " of layer ", l, " must be ",
         dtype_name(grad_output), " of shape (", rows, ", ", cols, "), got ",
         dtype_name(tensor), " of shape ", shape(tensor));
  }
}

// The tensors of `saved` at the places where the backward pass looks for them.
// Only autograd.py calls the operator, with what its Plan kept; the checks keep
// a mistake there from reading memory that is not ours. `holder` owns the
// matrices that had to be made.
cpu::Saved unpack(
    const std::vector<Tensor>& saved,
    const Tensor& grad_output,
    Activation output_activation,
    const Needs& needs,
    std::vector<Tensor>& holder) {
  const std::size_t layers = needs.layers(), lowest = needs.lowest_layer();
  std::size_t next = 0;
  const auto take = [&](bool is_saved) -> const Tensor* {
    if (!is_saved) {
      return nullptr;
    }
    if (next == saved.size()) {
      fail("relu_mlp::backward: needs ", needs.flags, " asks for more than the ",
           saved.size(), " tensors in saved");
    }
    return &saved[next++];
  };
  const auto take_matrix = [&](bool is_saved) -> const Tensor* {
    const Tensor* tensor = take(is_saved);
    if (!tensor || tensor->dim() == 2) {
      return tensor;
    }
    if (tensor->dim() == 0) {
      fail("relu_mlp::backward: saved must have no tensor of shape ()");
    }
    holder.push_back(as_matrix(*tensor));
    return &holder.back();
  };

  holder.reserve(2);
  cpu::Saved result;
  result.inputs.reserve(layers);
  result.weights.reserve(layers);
  result.inputs.push_back(take_matrix(needs.weight(0)));
  result.y = take_matrix(output_activation != Activation::none);
  for (std::size_t l = 0; l < layers; ++l) {
    result.weights.push_back(take(needs.propagation_through(l)));
  }
  for (std::size_t l = 1; l < layers; ++l) {
    result.inputs.push_back(take(l > lowest || needs.x() || needs.weight(l)));
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

std::vector<Tensor> backward(
    const Tensor& grad_output,
    const std::vector<Tensor>& saved,
    const std::string& output_activation,
    const std::string& flags) {
  if (flags.size() < 3 || flags.size() % 2 == 0 || grad_output.dim() < 1) {
    fail("relu_mlp::backward: expected 1 + 2 L needs and a grad_output of at "
         "least one dimension, got '", flags, "' and shape ",
         shape(grad_output));
  }
  const Needs needs{flags};
  const Activation activation = parse_activation(output_activation);
  const Tensor grad_matrix = as_matrix(grad_output);
  std::vector<Tensor> holder;
  const cpu::Saved operands =
      unpack(saved, grad_matrix, activation, needs, holder);

  cpu::Gradients gradients =
      cpu::backward(grad_matrix, operands, activation, needs);
  if (needs.x()) {
    gradients[0] = with_leading_sizes(*gradients[0], grad_output);
  }
  std::vector<Tensor> result;
  result.reserve(gradients.size());
  for (std::optional<Tensor>& gradient : gradients) {
    if (gradient) {
      result.push_back(std::move(*gradient));
    }
  }
  return result;
}

std::tuple<Tensor, std::vector<Tensor>> loss_and_grads(
    const Tensor& x,
    const Tensor& target,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases,
    const std::string& loss,
    const std::string& output_activation) {
  check_layers(x, weights, biases);
  bool fits = target.dim() == x.dim() &&
      target.size(target.dim() - 1) == weights.back().size(0);
  for (int64_t d = 0; fits && d + 1 < x.dim(); ++d) {
    fits = target.size(d) == x.size(d);
  }
  if (!fits) {
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = weights.back().size(0);
    fail("target must have the output's shape ", shape_of(sizes), ", got ",
         shape(target));
  }
  check_like_x(target, x, "target");

  cpu::LossAndGradients result = cpu::loss_and_grads(
      as_matrix(x), as_matrix(target), weights, biases, parse_loss(loss),
      parse_activation(output_activation));

  std::vector<Tensor> gradients;
  gradients.reserve(weights.size() + biases.size());
  for (std::size_t n = 0; n < weights.size() + biases.size(); ++n) {
    std::optional<Tensor>& gradient = result.gradients[1 + n];
    gradients.push_back(gradient ? std::move(*gradient) : empty<1>({0}, x));
  }
  return {std::move(result.loss), std::move(gradients)};
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
#if defined(__AVX512F__)
  text << "instruction_set: avx512\n";
#elif defined(__AVX2__)
  text << "instruction_set: avx2\n";
#elif defined(__x86_64__) || defined(_M_X64)
  text << "instruction_set: sse2\n";
#elif defined(__aarch64__)
  text << "instruction_set: neon\n";
#else
  text << "instruction_set: baseline\n";
#endif
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
  // The gradients are those of the weights, then one for every entry of
  // biases: without elements, where the entry has none.
  m.def(
      "loss_and_grads(Tensor x, Tensor target, Tensor[] weights, "
      "Tensor[] biases, str loss, str output_activation) "
      "-> (Tensor, Tensor[])");
  m.def("_build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(relu_mlp, CompositeExplicitAutograd, m) {
  m.impl("_build_info", TORCH_BOX(&relu_mlp::build_info));
}

STABLE_TORCH_LIBRARY_IMPL(relu_mlp, CPU, m) {
  m.impl("relu_mlp", TORCH_BOX(&relu_mlp::differentiable));
  m.impl("forward", TORCH_BOX(&relu_mlp::forward));
  m.impl("backward", TORCH_BOX(&relu_mlp::backward));
  m.impl("loss_and_grads", TORCH_BOX(&relu_mlp::loss_and_grads));
}
