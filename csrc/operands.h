// Converts tensors to the plain data of network.h, and allocates the results.
#pragma once

#include "network.h"
#include "passes.h"

namespace relu_mlp {

// Converts tensors to plain data, and owns the copies that this needs.
template <typename T>
class Operands {
 public:
  // At most `max_tensors` tensors will be converted. `needs_contiguous` says
  // whether the passes of the device need contiguous weights and y. Otherwise
  // only each row must be contiguous.
  Operands(std::size_t max_tensors, bool needs_contiguous)
      : needs_contiguous_(needs_contiguous) {
    copies_.reserve(max_tensors);
  }

  // A contiguous matrix, or vector.
  Matrix<const T> whole(const Tensor& tensor) {
    const int64_t* sizes = tensor.sizes();
    return contiguous(vector(tensor), sizes[0], sizes[1]);
  }
  const T* vector(const Tensor& tensor) {
    return as_contiguous(tensor, copies_.emplace_back())
        .template data<const T>();
  }
  // A matrix with contiguous rows and any row stride.
  Matrix<const T> rows(const Tensor& tensor) {
    const auto m = matrix<const T>(tensor);
    return m.col_stride == 1 ? m : whole(tensor);
  }
  // The target of a loss: values, or a class for each row.
  Target<T> target(const Tensor& tensor) {
    if (tensor.dtype() != aoti_torch_dtype_int64()) {
      return {whole(tensor), {}};
    }
    const Tensor& classes = as_contiguous(tensor, copies_.emplace_back());
    return {{}, contiguous(classes.data<const int64_t>(), classes.numel(), 1)};
  }
  // A weight or y.
  Matrix<const T> parameter(const Tensor& tensor) {
    return needs_contiguous_ ? whole(tensor) : rows(tensor);
  }

 private:
  std::vector<Tensor> copies_;
  const bool needs_contiguous_;
};

// The network of a forward pass, or of a backward pass that recomputes.
template <typename T>
Network<T> whole_network(
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases,
    Activation output_activation,
    Activate<T> activate,
    Operands<T>& operands) {
  Network<T> network{operands.rows(x), {}, output_activation, activate};
  network.layers.reserve(weights.size());
  for (std::size_t l = 0; l < weights.size(); ++l) {
    const bool has_bias = !biases.empty() && biases[l].numel() > 0;
    network.layers.push_back(
        {operands.parameter(weights[l]),
         has_bias ? operands.vector(biases[l]) : nullptr});
  }
  return network;
}

// The network of a backward pass, with the operands in `saved`. Sets the hidden
// activations, y and grad_output of `pass`, which is a BackwardPass or the
// VjpPass of one. An operand that is not
// saved still has its width if a neighbor determines it. Any other width is
// `unknown_width`, and no result depends on it.
template <typename T, typename Pass>
Network<T> saved_network(
    const Tensor& grad_output,
    const Saved& saved,
    Activation output_activation,
    Activate<T> activate,
    int64_t unknown_width,
    Operands<T>& operands,
    Pass& pass) {
  const std::size_t layers = saved.weights.size();
  const int64_t rows = grad_output.size(0);
  Network<T> network{{nullptr, rows, 0, 0, 1}, {}, output_activation, activate};
  network.layers.resize(layers);
  int64_t width = grad_output.size(1);
  for (std::size_t l = layers; l-- > 0;) {
    Matrix<const T>& weight = network.layers[l].weight;
    const Tensor *w = saved.weights[l], *input = saved.inputs[l];
    weight = {nullptr, width, unknown_width, 0, 1};
    if (w) {
      weight = operands.parameter(*w);
    } else if (input) {
      weight.cols = input->size(1);
    }
    width = weight.cols;
  }
  if (saved.inputs[0]) {
    network.x = operands.rows(*saved.inputs[0]);
  }
  for (std::size_t l = 1; l < layers; ++l) {
    pass.hidden.push_back(
        saved.inputs[l] ? operands.whole(*saved.inputs[l]) : Matrix<const T>{});
  }
  if (saved.y) {
    pass.y = operands.parameter(*saved.y);
  }
  pass.grad_output = matrix<const T>(grad_output);
  return network;
}

// The tangents of a VjpPass: a network of the same shape as `network`.
template <typename T>
Network<T> tangents_of(
    const Network<T>& network,
    const Cotangents& cotangents,
    Operands<T>& operands) {
  Network<T> tangents = network;
  tangents.x.data = nullptr;
  if (cotangents.x) {
    tangents.x = operands.rows(*cotangents.x);
  }
  for (std::size_t l = 0; l < tangents.layers.size(); ++l) {
    const Tensor *weight = cotangents.weights[l], *bias = cotangents.biases[l];
    Layer<T>& layer = tangents.layers[l];
    layer.weight.data = nullptr;
    if (weight) {
      layer.weight = operands.parameter(*weight);
    }
    layer.bias = bias ? operands.vector(*bias) : nullptr;
  }
  return tangents;
}

// Allocates the needed gradients and sets their pointers in `pass`.
// new_matrix(rows, cols) allocates a tensor.
template <typename T, typename NewMatrix>
Gradients new_gradients(
    const Network<T>& network,
    const Tensor& like,
    BackwardPass<T>& pass,
    const NewMatrix& new_matrix) {
  const std::size_t layers = network.layers.size();
  const Needs& needs = pass.needs;
  Gradients gradients(1 + 2 * layers);
  pass.grad_weights.resize(layers);
  pass.grad_biases.resize(layers);
  if (needs.x()) {
    gradients[0] = new_matrix(network.x.rows, network.width(0));
    pass.grad_x = gradients[0].template data<T>();
  }
  for (std::size_t l = 0; l < layers; ++l) {
    const int64_t out = network.width(l + 1), in = network.width(l);
    if (needs.weight(l)) {
      Tensor& grad = gradients[1 + l] = new_matrix(out, in);
      pass.grad_weights[l] = grad.template data<T>();
    }
    if (needs.bias(l)) {
      Tensor& grad = gradients[1 + layers + l] = empty<1>({out}, like);
      pass.grad_biases[l] = grad.template data<T>();
    }
  }
  return gradients;
}

// The flags of `Needs` for a pass with a loss: all weights, and all biases that
// exist.
template <typename T>
std::string needs_of_loss(const Network<T>& network) {
  std::string flags = "0" + std::string(network.layers.size(), '1');
  for (const Layer<T>& layer : network.layers) {
    flags += layer.bias ? '1' : '0';
  }
  return flags;
}

// z = phi(z) for `count` contiguous elements by PyTorch's in-place operator,
// with PyTorch's accuracy and speed.
template <typename T>
void apply_in_place(
    const char* in_place,
    T* z,
    int64_t count,
    int32_t device_type,
    int32_t device_index) {
  Tensor tensor = from_blob<T, 1>(z, {count}, {1}, device_type, device_index);
  StableIValue stack = torch::stable::detail::from(tensor.release());
  check_call(torch_call_dispatcher(in_place, "", &stack, TORCH_ABI_VERSION));
  Tensor(torch::stable::detail::to<AtenTensorHandle>(stack));
}

} // namespace relu_mlp
