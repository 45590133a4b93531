#include "direct_passes.h"

#include <ATen/EmptyTensor.h>

#include <algorithm>

namespace relu_mlp::node {

const Direct* direct = nullptr;

namespace {

// Calls f<T>() with the C++ type of a dtype; std::nullopt for other dtypes.
template <typename F>
auto with_type(at::ScalarType dtype, const F& f)
    -> decltype(f.template operator()<float>()) {
  switch (dtype) {
    case at::kFloat:
      return f.template operator()<float>();
    case at::kDouble:
      return f.template operator()<double>();
    case at::kBFloat16:
      return f.template operator()<torch::headeronly::BFloat16>();
    case at::kHalf:
      return f.template operator()<torch::headeronly::Half>();
    default:
      return std::nullopt;
  }
}

std::optional<Activation> parse_activation(const std::string& name) {
  const auto found =
      std::find(std::begin(activation_names), std::end(activation_names), name);
  if (found == std::end(activation_names)) {
    return std::nullopt;
  }
  return static_cast<Activation>(found - std::begin(activation_names));
}

// Whether this is a plain CPU tensor of the dtype, with memory for all of its
// elements.
bool is_readable(const at::Tensor& tensor, at::ScalarType dtype) {
  if (!tensor.defined() || !tensor.is_cpu() || !is_plain(tensor) ||
      tensor.scalar_type() != dtype) {
    return false;
  }
  if (tensor.numel() == 0) {
    return true;
  }
  int64_t last = tensor.storage_offset();
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    last += (tensor.size(d) - 1) * tensor.stride(d);
  }
  return static_cast<std::size_t>(last + 1) * tensor.itemsize() <=
      tensor.storage().nbytes();
}

// (*, features) as a matrix with contiguous rows, if no copy is needed.
template <typename T>
std::optional<Matrix<const T>> rows(const at::Tensor& tensor) {
  const int64_t dim = tensor.dim();
  const T* data = static_cast<const T*>(tensor.const_data_ptr());
  if (dim == 2) {
    const int64_t cols = tensor.size(1);
    if (cols > 1 && tensor.stride(1) != 1) {
      return std::nullopt;
    }
    return Matrix<const T>{data, tensor.size(0), cols, tensor.stride(0), 1};
  }
  if (dim == 0 || !tensor.is_contiguous()) {
    return std::nullopt;
  }
  int64_t count = 1;
  for (int64_t d = 0; d + 1 < dim; ++d) {
    count *= tensor.size(d);
  }
  return contiguous(data, count, tensor.size(dim - 1));
}

template <typename T>
bool has_shape(const Matrix<T>& m, int64_t rows, int64_t cols) {
  return m.rows == rows && m.cols == cols;
}

// A new contiguous tensor, not initialized.
template <typename T>
at::Tensor new_tensor(at::IntArrayRef sizes) {
  at::Tensor tensor(
      at::detail::empty_cpu(sizes, c10::CppTypeToScalarType<T>::value));
  direct->prefer_huge_pages(tensor.data_ptr(), int64_t(tensor.nbytes()));
  return tensor;
}

template <typename T>
T* data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

at::DimVector with_last(const at::Tensor& like, int64_t features) {
  at::DimVector sizes(like.sizes());
  sizes.back() = features;
  return sizes;
}

template <typename T>
std::optional<Network<T>> network_of(const Call& call) {
  const std::optional<Activation> phi = parse_activation(call.activation);
  const at::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
  const std::size_t layers = call.weights.size();
  if (!phi || layers == 0 || !is_readable(call.x, dtype) ||
      (!call.biases.empty() && call.biases.size() != layers)) {
    return std::nullopt;
  }
  const auto x = rows<T>(call.x);
  if (!x) {
    return std::nullopt;
  }
  Network<T> network{*x, {}, *phi, direct->passes<T>().activate};
  network.layers.reserve(layers);
  int64_t width = x->cols;
  for (std::size_t l = 0; l < layers; ++l) {
    const at::Tensor& weight = call.weights[l];
    if (weight.dim() != 2 || !is_readable(weight, dtype)) {
      return std::nullopt;
    }
    const auto w = rows<T>(weight);
    if (!w || w->cols != width) {
      return std::nullopt;
    }
    width = w->rows;
    const T* b = nullptr;
    if (!call.biases.empty() && call.biases[l].numel() > 0) {
      const at::Tensor& bias = call.biases[l];
      if (bias.dim() != 1 || bias.size(0) != width ||
          (width > 1 && bias.stride(0) != 1) || !is_readable(bias, dtype)) {
        return std::nullopt;
      }
      b = static_cast<const T*>(bias.const_data_ptr());
    }
    network.layers.push_back({*w, b});
  }
  return network;
}

// The gradient of y as a matrix of any strides, which may be a copy in
// `holder`.
template <typename T>
std::optional<Matrix<const T>> grad_matrix(
    const at::Tensor& grad,
    at::Tensor& holder) {
  if (grad.dim() == 0 ||
      !is_readable(grad, c10::CppTypeToScalarType<T>::value)) {
    return std::nullopt;
  }
  if (grad.dim() == 2) {
    const int64_t cols = grad.size(1);
    return Matrix<const T>{
        static_cast<const T*>(grad.const_data_ptr()), grad.size(0), cols,
        grad.stride(0), cols <= 1 ? 1 : grad.stride(1)};
  }
  holder = grad.contiguous();
  return rows<T>(holder);
}

// A plain contiguous matrix.
template <typename T>
std::optional<Matrix<const T>> contiguous_matrix(const at::Tensor& tensor) {
  if (!is_readable(tensor, c10::CppTypeToScalarType<T>::value) ||
      tensor.dim() != 2 || !tensor.is_contiguous()) {
    return std::nullopt;
  }
  return rows<T>(tensor);
}

// The network of a backward pass, with the operands in `saved`. Sets the hidden
// activations, y and the gradient of y of `pass`, which is a BackwardPass or
// the VjpPass of one. `holder` owns the gradient if it had to be copied.
template <typename T, template <typename> typename Pass>
std::optional<Network<T>> saved_network(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const Needs& needs,
    at::Tensor& holder,
    Pass<T>& pass) {
  const std::optional<Activation> phi = parse_activation(activation);
  const auto grad = grad_matrix<T>(grad_output, holder);
  const std::size_t layers = needs.layers();
  if (!direct || !phi || !grad || needs.lowest_layer() == layers) {
    return std::nullopt;
  }
  pass.grad_output = *grad;
  pass.hidden.resize(layers - 1);
  Network<T> network{
      {nullptr, grad->rows, 0, 0, 1}, {}, *phi, direct->passes<T>().activate};
  network.layers.resize(layers);
  std::size_t next = 0;
  const auto take = [&](bool is_saved, Matrix<const T>& to) {
    if (!is_saved) {
      return true;
    }
    if (next == saved.size() ||
        !is_readable(saved[next], grad_output.scalar_type())) {
      return false;
    }
    const auto m = rows<T>(saved[next++]);
    if (m) {
      to = *m;
    }
    return m.has_value();
  };
  bool is_complete = take(needs.reads_input(0), network.x) &&
      take(needs.reads_y(*phi), pass.y);
  for (std::size_t l = 0; l < layers; ++l) {
    is_complete =
        is_complete && take(needs.reads_weight(l), network.layers[l].weight);
  }
  for (std::size_t l = 1; l < layers; ++l) {
    is_complete = is_complete && take(needs.reads_input(l), pass.hidden[l - 1]);
  }
  if (!is_complete || next != saved.size() ||
      (needs.reads_y(*phi) && !has_shape(pass.y, grad->rows, grad->cols))) {
    return std::nullopt;
  }
  int64_t width = grad->cols;
  for (std::size_t l = layers; l-- > 0;) {
    Matrix<const T>& weight = network.layers[l].weight;
    const Matrix<const T>& input = l == 0 ? network.x : pass.hidden[l - 1];
    const bool has_weight = needs.reads_weight(l);
    const bool has_input = needs.reads_input(l);
    // An operand that is not saved has the widths of its neighbors.
    const int64_t in = has_weight ? weight.cols : has_input ? input.cols : 0;
    const bool is_contiguous =
        l == 0 || input.row_stride == in || input.rows <= 1;
    if ((has_weight && !has_shape(weight, width, in)) ||
        (has_input && (!has_shape(input, grad->rows, in) || !is_contiguous))) {
      return std::nullopt;
    }
    if (!has_weight) {
      weight = {nullptr, width, in, 0, 1};
    }
    width = in;
  }
  return network;
}

// Allocates the needed gradients, runs `pass` and returns them.
template <typename T>
Gradients run_backward(
    const Network<T>& network,
    BackwardPass<T>& pass,
    const at::Tensor& grad_output) {
  const std::size_t layers = network.layers.size();
  Gradients gradients(1 + 2 * layers);
  pass.grad_weights.resize(layers);
  pass.grad_biases.resize(layers);
  if (pass.needs.x()) {
    gradients[0] = new_tensor<T>(with_last(grad_output, network.width(0)));
    pass.grad_x = data<T>(gradients[0]);
  }
  for (std::size_t l = 0; l < layers; ++l) {
    const int64_t out = network.width(l + 1), in = network.width(l);
    if (pass.needs.weight(l)) {
      gradients[1 + l] = new_tensor<T>({out, in});
      pass.grad_weights[l] = data<T>(gradients[1 + l]);
    }
    if (pass.needs.bias(l)) {
      gradients[1 + layers + l] = new_tensor<T>({out});
      pass.grad_biases[l] = data<T>(gradients[1 + layers + l]);
    }
  }
  direct->passes<T>().backward(network, pass);
  return gradients;
}

} // namespace

std::optional<ForwardResult> direct_forward(
    const Call& call,
    bool save_hidden) {
  if (!direct) {
    return std::nullopt;
  }
  return with_type(
      call.x.scalar_type(), [&]<typename T>() -> std::optional<ForwardResult> {
        const auto network = network_of<T>(call);
        if (!network) {
          return std::nullopt;
        }
        const std::size_t layers = call.weights.size();
        ForwardResult result;
        std::vector<T*> hidden;
        if (save_hidden) {
          result.hidden.reserve(layers - 1);
          hidden.reserve(layers - 1);
          for (std::size_t l = 1; l < layers; ++l) {
            result.hidden.push_back(
                new_tensor<T>({network->x.rows, network->width(l)}));
            hidden.push_back(data<T>(result.hidden.back()));
          }
        }
        result.y = new_tensor<T>(with_last(call.x, network->width(layers)));
        direct->passes<T>().forward(*network, hidden, data<T>(result.y));
        return result;
      });
}

bool is_finite(const at::Tensor& tensor) {
  // Infinite numbers and NaN have the largest exponent.
  const auto has_no_largest = [&]<typename Bits>(Bits exponent) {
    const auto* bits = static_cast<const Bits*>(tensor.const_data_ptr());
    bool found = false;
    for (int64_t i = 0; i < tensor.numel(); ++i) {
      found |= (bits[i] & exponent) == exponent;
    }
    return !found;
  };
  const at::ScalarType dtype = tensor.scalar_type();
  if (!is_readable(tensor, dtype) || !tensor.is_contiguous()) {
    return false;
  }
  switch (dtype) {
    case at::kFloat:
      return has_no_largest(uint32_t(0x7f800000));
    case at::kDouble:
      return has_no_largest(uint64_t(0x7ff0000000000000));
    case at::kBFloat16:
      return has_no_largest(uint16_t(0x7f80));
    case at::kHalf:
      return has_no_largest(uint16_t(0x7c00));
    default:
      return false;
  }
}

bool has_curvature(const std::string& activation) {
  const std::optional<Activation> phi = parse_activation(activation);
  return phi &&
      with_row(*phi, []<typename Row>() { return Row::has_curvature; });
}

bool is_needs(const std::string& needs) {
  return needs.size() >= 3 && needs.size() % 2 == 1 &&
      needs.find_first_not_of("01") == std::string::npos;
}

std::optional<Gradients> direct_backward(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& flags,
    const std::vector<at::Tensor>& grad_hidden) {
  return with_type(
      grad_output.scalar_type(), [&]<typename T>() -> std::optional<Gradients> {
        at::Tensor holder;
        BackwardPass<T> pass{Needs{flags}};
        const auto network = saved_network(
            grad_output, saved, activation, pass.needs, holder, pass);
        if (!network) {
          return std::nullopt;
        }
        for (std::size_t l = 1; l <= grad_hidden.size(); ++l) {
          Matrix<const T>& grad = pass.grad_hidden.emplace_back();
          if (const at::Tensor& tensor = grad_hidden[l - 1]; tensor.defined()) {
            const auto m = contiguous_matrix<T>(tensor);
            if (!m || !has_shape(*m, network->x.rows, network->width(l))) {
              return std::nullopt;
            }
            grad = *m;
          }
        }
        return run_backward(*network, pass, grad_output);
      });
}

std::optional<std::vector<at::Tensor>> direct_vjp(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& flags,
    const std::vector<at::Tensor>& cotangents,
    const std::vector<bool>& wanted) {
  using Results = std::vector<at::Tensor>;
  return with_type(
      grad_output.scalar_type(), [&]<typename T>() -> std::optional<Results> {
        const Needs needs{flags};
        const std::size_t layers = needs.layers();
        at::Tensor holder;
        VjpPass<T> pass;
        const auto network =
            saved_network(grad_output, saved, activation, needs, holder, pass);
        if (!network) {
          return std::nullopt;
        }
        // The cotangents, as a network of the same shape.
        Network<T>& tangents = pass.tangents = *network;
        tangents.x.data = nullptr;
        std::size_t next = 0;
        const auto take = [&](bool is_result) -> const at::Tensor* {
          return is_result && cotangents[next++].defined()
              ? &cotangents[next - 1]
              : nullptr;
        };
        if (const at::Tensor* x = take(needs.x())) {
          const auto m = rows<T>(*x);
          if (!is_readable(*x, grad_output.scalar_type()) || !m ||
              !has_shape(*m, network->x.rows, network->width(0))) {
            return std::nullopt;
          }
          tangents.x = *m;
        }
        for (std::size_t l = 0; l < layers; ++l) {
          Matrix<const T>& weight = tangents.layers[l].weight;
          weight.data = nullptr;
          if (const at::Tensor* tensor = take(needs.weight(l))) {
            const auto m = contiguous_matrix<T>(*tensor);
            if (!m ||
                !has_shape(*m, network->width(l + 1), network->width(l))) {
              return std::nullopt;
            }
            weight = *m;
          }
        }
        for (std::size_t l = 0; l < layers; ++l) {
          if (const at::Tensor* tensor = take(needs.bias(l))) {
            if (!is_readable(*tensor, grad_output.scalar_type()) ||
                !tensor->is_contiguous() ||
                tensor->numel() != network->width(l + 1)) {
              return std::nullopt;
            }
            tangents.layers[l].bias =
                static_cast<const T*>(tensor->const_data_ptr());
          }
        }

        Results results(wanted.size());
        next = 0;
        const auto result_like = [&](const at::Tensor& operand) -> T* {
          if (!wanted[next++]) {
            return nullptr;
          }
          results[next - 1] = new_tensor<T>(operand.sizes());
          return data<T>(results[next - 1]);
        };
        const auto result_of = [&](bool is_saved) -> T* {
          return is_saved ? result_like(saved[next - 1]) : nullptr;
        };
        pass.of_grad_output = result_like(grad_output);
        pass.of_inputs.push_back(result_of(needs.reads_input(0)));
        pass.of_y = result_of(needs.reads_y(network->output_activation));
        for (std::size_t l = 0; l < layers; ++l) {
          pass.of_weights.push_back(result_of(needs.reads_weight(l)));
        }
        for (std::size_t l = 1; l < layers; ++l) {
          pass.of_inputs.push_back(result_of(needs.reads_input(l)));
        }
        direct->passes<T>().vjp(*network, pass);
        return results;
      });
}

std::optional<Gradients> direct_recompute_backward(
    const at::Tensor& grad_output,
    const Call& call,
    const std::string& flags) {
  if (!direct) {
    return std::nullopt;
  }
  return with_type(
      call.x.scalar_type(), [&]<typename T>() -> std::optional<Gradients> {
        at::Tensor holder;
        const auto network = network_of<T>(call);
        const auto grad = grad_matrix<T>(grad_output, holder);
        if (!network || !grad ||
            !has_shape(
                *grad, network->x.rows, network->width(call.weights.size()))) {
          return std::nullopt;
        }
        BackwardPass<T> pass{Needs{flags}};
        pass.recompute = true;
        pass.grad_output = *grad;
        return run_backward(*network, pass, grad_output);
      });
}

} // namespace relu_mlp::node
