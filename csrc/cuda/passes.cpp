// The passes on a GPU: tensors to plain data, new tensors for the results, and
// the choice of the regime. Kernels run on the device of the tensors, in the
// order of PyTorch's current stream of that device.
#include "passes.h"

#include "layered/layered.h"
#include "fused/fused.h"

namespace relu_mlp::cuda {
namespace {

// Makes a tensor's device the current one while it lives: PyTorch's, which is
// set back at the end, and that of the CUDA runtime which launches our kernels.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) {
#ifndef RELU_MLP_CUDA_ON_HOST
    const int32_t device = tensor.device_index();
    int32_t current;
    check_call(aoti_torch_get_current_device_index(&current));
    if (device != current) {
      check_call(aoti_torch_create_device_guard(device, &guard_));
    }
    set_device(device);
#endif
  }
  OnDeviceOf(const OnDeviceOf&) = delete;
  ~OnDeviceOf() {
    if (guard_) {
      aoti_torch_delete_device_guard(guard_);
    }
  }

 private:
  DeviceGuardHandle guard_ = nullptr;
};

// Tensors as plain data, and the copies that it takes where a kernel wants
// rows, or the whole, without gaps.
template <typename T>
class Operands {
 public:
  explicit Operands(std::size_t most) {
    copies_.reserve(most);
  }
  Matrix<const T> whole(const Tensor& tensor) {
    return matrix<const T>(as_contiguous(tensor, copies_.emplace_back()));
  }
  Matrix<const T> rows(const Tensor& tensor) {
    const auto m = matrix<const T>(tensor);
    return m.col_stride == 1 ? m : whole(tensor);
  }
  const T* data(const Tensor& tensor) {
    return as_contiguous(tensor, copies_.emplace_back())
        .template data<const T>();
  }

 private:
  std::vector<Tensor> copies_;
};

template <typename T>
Network<T> network_of(
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases,
    Activation output_activation,
    Operands<T>& given) {
  Network<T> network;
  network.x = given.rows(x);
  network.output_activation = output_activation;
  network.widths.push_back(x.size(1));
  for (std::size_t l = 0; l < weights.size(); ++l) {
    const bool has_bias = !biases.empty() && biases[l].numel() > 0;
    network.widths.push_back(weights[l].size(0));
    network.weights.push_back(given.whole(weights[l]));
    network.biases.push_back(has_bias ? given.data(biases[l]) : nullptr);
  }
  return network;
}

// New tensors for the gradients that are needed, entered into `pass`.
template <typename T>
Gradients new_gradients(
    const Network<T>& network,
    int64_t rows,
    const Tensor& like,
    BackwardPass<T>& pass) {
  const std::size_t layers = network.layers();
  const Needs& needs = pass.needs;
  Gradients gradients(1 + 2 * layers);
  pass.grad_weights.resize(layers);
  pass.grad_biases.resize(layers);
  if (needs.x()) {
    gradients[0] = empty<2>({rows, network.widths[0]}, like);
    pass.grad_x = gradients[0].template data<T>();
  }
  for (std::size_t l = 0; l < layers; ++l) {
    const int64_t out = network.widths[l + 1], in = network.widths[l];
    if (needs.weight(l)) {
      Tensor& grad = gradients[1 + l] = empty<2>({out, in}, like);
      pass.grad_weights[l] = grad.template data<T>();
    }
    if (needs.bias(l)) {
      Tensor& grad = gradients[1 + layers + l] = empty<1>({out}, like);
      pass.grad_biases[l] = grad.template data<T>();
    }
  }
  return gradients;
}

// -- The narrow regime -------------------------------------------------------

// The layers from `first` on, as the narrow regime has them.
template <typename T>
Narrow<T> narrow_network(const Network<T>& network, std::size_t first) {
  Narrow<T> narrow{};
  narrow.layers = int(network.layers() - first);
  narrow.output_activation = network.output_activation;
  for (int l = 0; l <= narrow.layers; ++l) {
    narrow.widths[l] = int(network.widths[first + l]);
  }
  for (int l = 0; l < narrow.layers; ++l) {
    narrow.weights[l] = network.weights[first + l].data;
    narrow.biases[l] =
        network.biases.empty() ? nullptr : network.biases[first + l];
  }
  return narrow;
}

template <typename T>
void run_narrow_forward(
    const Network<T>& network,
    const std::vector<T*>& hidden,
    T* y,
    Stream stream) {
  NarrowForward<T> pass{network.x, {}, y};
  std::copy(hidden.begin(), hidden.end(), pass.hidden);
  narrow_forward(narrow_network(network, 0), pass, stream);
}

// Layers below the lowest that has a gradient are left out.
template <typename T>
void run_narrow_backward(
    const Network<T>& network,
    const BackwardPass<T>& pass,
    int64_t rows,
    const Tensor& like,
    Stream stream) {
  const std::size_t first = pass.recompute ? 0 : pass.needs.lowest_layer();
  const Narrow<T> narrow = narrow_network(network, first);
  NarrowBackward<T> to{};
  to.x = network.x;
  if (first > 0) {
    to.x = contiguous(pass.hidden[first - 1], rows, network.widths[first]);
  }
  for (int l = 0; l < narrow.layers; ++l) {
    if (!pass.recompute && l + 1 < narrow.layers) {
      to.hidden[l] = pass.hidden[first + l];
    }
    to.grad_weights[l] = pass.grad_weights[first + l];
    to.grad_biases[l] = pass.grad_biases[first + l];
  }
  to.y = pass.y;
  to.grad_output = pass.grad_output;
  to.target = pass.target;
  to.loss_scale = pass.loss_scale;
  to.grad_x = pass.grad_x;

  const int64_t bytes =
      narrow_workspace(narrow, rows, device_properties());
  const Tensor workspace = empty<1>({bytes / int64_t(sizeof(T)) + 1}, like);
  const Tensor squares = empty<1>({int64_t(sizeof(double) / sizeof(T))}, like);
  to.squares = pass.loss ? squares.data<double>() : nullptr;
  narrow_backward(narrow, to, workspace.data<void>(), stream);
  if (pass.loss) {
    write_loss(pass.loss, to.squares, pass.loss_scale, stream);
  }
}

// -- The choice --------------------------------------------------------------

template <typename T>
bool is_narrow(
    const std::vector<int64_t>& widths,
    int64_t rows,
    bool is_backward,
    bool recompute) {
  return narrow_serves(as_narrow(
      {rows, widths, int(sizeof(T)), is_backward, recompute,
       device_properties()}));
}

template <typename T>
void run_forward(
    const Network<T>& network,
    const std::vector<T*>& hidden,
    T* y,
    const Tensor& like) {
  const Stream stream = current_stream();
  if constexpr (!std::is_same_v<T, double>) {
    if (is_narrow<T>(network.widths, network.x.rows, false, false)) {
      run_narrow_forward(network, hidden, y, stream);
      return;
    }
  }
  WideLayers<T>(network, like, stream).forward(hidden, y);
}

template <typename T>
void run_backward(
    const Network<T>& network,
    const BackwardPass<T>& pass,
    int64_t rows,
    const Tensor& like) {
  if (pass.needs.lowest_layer() == network.layers()) {
    return; // nothing is asked for
  }
  const Stream stream = current_stream();
  if constexpr (!std::is_same_v<T, double>) {
    const auto first = network.widths.begin() +
        (pass.recompute ? 0 : pass.needs.lowest_layer());
    if (is_narrow<T>(
            {first, network.widths.end()}, rows, true, pass.recompute)) {
      run_narrow_backward(network, pass, rows, like, stream);
      return;
    }
  }
  WideLayers<T>(network, like, stream).backward(pass);
}

// -- The passes --------------------------------------------------------------

ForwardResult forward(
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases,
    Activation output_activation,
    bool save_hidden) {
  return dispatch(x.dtype(), [&]<typename T>() {
    const OnDeviceOf device(x);
    Operands<T> given(1 + 2 * weights.size());
    const Network<T> network =
        network_of(x, weights, biases, output_activation, given);
    ForwardResult result;
    std::vector<T*> hidden;
    for (std::size_t l = 0; save_hidden && l + 1 < weights.size(); ++l) {
      result.hidden.push_back(empty<2>({x.size(0), network.widths[l + 1]}, x));
      hidden.push_back(result.hidden.back().template data<T>());
    }
    result.y = empty<2>({x.size(0), network.widths.back()}, x);
    run_forward(network, hidden, result.y.template data<T>(), x);
    return result;
  });
}

Gradients backward(
    const Tensor& grad_output,
    const Saved& saved,
    Activation output_activation,
    const Needs& needs) {
  return dispatch(grad_output.dtype(), [&]<typename T>() {
    const OnDeviceOf device(grad_output);
    const std::size_t layers = needs.layers();
    const int64_t rows = grad_output.size(0);
    Operands<T> given(2 * layers + 2);
    Network<T> network{
        {}, {nullptr, rows, 0, 0, 1}, {}, {}, output_activation};
    network.widths.resize(layers + 1, 1);
    network.weights.resize(layers);
    BackwardPass<T> pass{needs};
    pass.grad_output = matrix<const T>(grad_output);
    network.widths[layers] = grad_output.size(1);
    // A superfluous operand leaves at least its shape behind, or its width
    // does not matter.
    for (std::size_t l = layers; l-- > 0;) {
      const Tensor *weight = saved.weights[l], *input = saved.inputs[l];
      if (weight) {
        network.weights[l] = given.whole(*weight);
        network.widths[l] = weight->size(1);
      } else if (input) {
        network.widths[l] = input->size(1);
      }
    }
    if (saved.inputs[0]) {
      network.x = given.rows(*saved.inputs[0]);
    }
    for (std::size_t l = 1; l < layers; ++l) {
      pass.hidden.push_back(
          saved.inputs[l] ? given.data(*saved.inputs[l]) : nullptr);
    }
    if (saved.y) {
      pass.y = given.data(*saved.y);
    }
    Gradients gradients = new_gradients(network, rows, grad_output, pass);
    run_backward(network, pass, rows, grad_output);
    return gradients;
  });
}

Gradients recompute_backward(
    const Tensor& grad_output,
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases,
    Activation output_activation,
    const Needs& needs) {
  return dispatch(x.dtype(), [&]<typename T>() {
    const OnDeviceOf device(x);
    Operands<T> given(1 + 2 * weights.size());
    const Network<T> network =
        network_of(x, weights, biases, output_activation, given);
    BackwardPass<T> pass{needs};
    pass.recompute = true;
    pass.grad_output = matrix<const T>(grad_output);
    Gradients gradients = new_gradients(network, x.size(0), x, pass);
    run_backward(network, pass, x.size(0), x);
    return gradients;
  });
}

LossAndGradients loss_and_grads(
    const Tensor& x,
    const Tensor& target,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases,
    Loss loss,
    Activation output_activation) {
  return dispatch(x.dtype(), [&]<typename T>() {
    const OnDeviceOf device(x);
    Operands<T> given(2 + 2 * weights.size());
    const Network<T> network =
        network_of(x, weights, biases, output_activation, given);
    std::string flags = "0" + std::string(weights.size(), '1');
    for (const T* bias : network.biases) {
      flags += bias ? '1' : '0';
    }
    BackwardPass<T> pass{Needs{flags}};
    pass.recompute = true;
    pass.target = given.data(target);
    pass.loss_scale = loss == Loss::sse ? 1.0
        : loss == Loss::half_sse        ? 0.5
                                        : 1.0 / double(target.numel());
    LossAndGradients result{
        empty<0>({}, x), new_gradients(network, x.size(0), x, pass)};
    pass.loss = result.loss.template data<T>();
    run_backward(network, pass, x.size(0), x);
    return result;
  });
}

} // namespace

const Passes passes{
    forward, backward, recompute_backward, loss_and_grads, true};

} // namespace relu_mlp::cuda
