#include "mlp.h"

#include "bf16_layers.h"
#include "call.h"
#include "huge_pages.h"
#include "library_layers.h"
#include "packed_layers.h"
#include "walk.h"

namespace relu_mlp::cpu {
namespace {

// A new tensor of Ts like `like`, contiguous, not filled.
template <typename T, std::size_t N>
Tensor new_tensor(const std::array<int64_t, N>& sizes, const Tensor& like) {
  Tensor tensor = empty<N>(sizes, like);
  prefer_huge_pages(
      tensor.data<T>(), tensor.numel() * static_cast<int64_t>(sizeof(T)));
  return tensor;
}

// Calls an in-place operator of PyTorch on contiguous memory, so that the
// transcendental functions have its accuracy and its speed.
template <typename T>
void activate(Activation activation, T* z, int64_t count) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  check_call(aoti_torch_create_tensor_from_blob(
      z, 1, &count, &stride, 0, dtype_number<T>(),
      aoti_torch_device_type_cpu(), 0, &handle));
  StableIValue stack = torch::stable::detail::from(handle);
  check_call(torch_call_dispatcher(
      activation == Activation::sigmoid ? "aten::sigmoid_" : "aten::tanh_", "",
      &stack, TORCH_ABI_VERSION));
  Tensor(torch::stable::detail::to<AtenTensorHandle>(stack));
}

// Tensors as a network, whose rows have to be contiguous, and the copies that it
// takes to make them so.
template <typename T>
struct Operands {
  std::vector<Tensor> copies;
  Network<T> network;

  Matrix<const T> whole(const Tensor& tensor) {
    return matrix<const T>(as_contiguous(tensor, copies.emplace_back()));
  }
  Matrix<const T> rows(const Tensor& tensor) {
    const auto m = matrix<const T>(tensor);
    if (m.col_stride == 1) {
      return m;
    }
    return matrix<const T>(as_contiguous(tensor, copies.emplace_back()));
  }
  const T* vector(const Tensor& tensor) {
    return as_contiguous(tensor, copies.emplace_back()).template data<const T>();
  }
};

template <typename T>
Operands<T> operands(
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases,
    Activation output_activation) {
  Operands<T> result;
  result.copies.reserve(1 + 2 * weights.size());
  result.network = {
      result.rows(x), {}, output_activation, activate<T>};
  result.network.layers.reserve(weights.size());
  for (std::size_t l = 0; l < weights.size(); ++l) {
    const bool has_bias = !biases.empty() && biases[l].numel() > 0;
    result.network.layers.push_back(
        {result.rows(weights[l]),
         has_bias ? result.vector(biases[l]) : nullptr});
  }
  return result;
}

// New tensors for the gradients that are needed, entered into `pass`.
template <typename T>
Gradients new_gradients(
    const Network<T>& network,
    const Tensor& like,
    BackwardPass<T>& pass) {
  const std::size_t layers = network.layers.size();
  const Needs& needs = pass.needs;
  Gradients gradients(1 + 2 * layers);
  pass.grad_weights.resize(layers);
  pass.grad_biases.resize(layers);
  if (needs.x()) {
    gradients[0] = new_tensor<T, 2>({network.x.rows, network.width(0)}, like);
    pass.grad_x = gradients[0].template data<T>();
  }
  for (std::size_t l = 0; l < layers; ++l) {
    const int64_t out = network.width(l + 1), in = network.width(l);
    if (needs.weight(l)) {
      Tensor& grad = gradients[1 + l] = new_tensor<T, 2>({out, in}, like);
      pass.grad_weights[l] = grad.template data<T>();
    }
    if (needs.bias(l)) {
      Tensor& grad = gradients[1 + layers + l] = empty<1>({out}, like);
      pass.grad_biases[l] = grad.template data<T>();
    }
  }
  return gradients;
}

// Refuses matrices that fit into no memory, so that sizes can be multiplied and added
// without an overflow. (A tensor may be that large: x and a weight may have a stride of 0.)
template <typename T>
void check_sizes(const Network<T>& network) {
  constexpr double most = double(int64_t(1) << 48);
  const double rows = double(network.x.rows);
  for (const Layer<T>& layer : network.layers) {
    const double out = double(layer.weight.rows), in = double(layer.weight.cols);
    const double largest = std::max({out * in, rows * in, rows * out});
    if (largest > most) {
      fail_to_allocate(largest * sizeof(T));
    }
  }
}

// Calls f<L>(plan) with the class that the plan names for the products.
template <typename T, typename F>
void with_layers(const Network<T>& network, const F& f) {
  check_sizes(network);
  const Plan plan = make_plan(call_of(network));
  switch (plan.layers) {
    case LayersKind::packed:
      return f.template operator()<PackedLayers<T>>(plan);
    case LayersKind::library:
      return f.template operator()<LibraryLayers<T>>(plan);
    case LayersKind::bf16:
      if constexpr (std::is_same_v<T, BFloat16>) {
        f.template operator()<Bf16Layers<float>>(plan);
      }
      return;
    case LayersKind::bf16_one_block:
      if constexpr (std::is_same_v<T, BFloat16>) {
        f.template operator()<Bf16Layers<BFloat16>>(plan);
      }
      return;
  }
}

template <typename T>
void run_forward(
    const Network<T>& network,
    const std::vector<T*>& hidden,
    T* y) {
  with_layers(network, [&]<typename L>(const Plan& plan) {
    walk_forward<L>(network, plan, hidden, y);
  });
}

template <typename T>
void run_backward(const Network<T>& network, const BackwardPass<T>& pass) {
  with_layers(network, [&]<typename L>(const Plan& plan) {
    walk_backward<L>(network, plan, pass);
  });
}

ForwardResult forward(
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases,
    Activation output_activation,
    bool save_hidden) {
  return relu_mlp::dispatch(x.dtype(), [&]<typename T>() {
    const Operands<T> given = operands<T>(x, weights, biases, output_activation);
    const int64_t rows = x.size(0);
    ForwardResult result;
    std::vector<T*> hidden;
    result.hidden.reserve(weights.size());
    hidden.reserve(weights.size());
    for (std::size_t l = 0; save_hidden && l + 1 < weights.size(); ++l) {
      result.hidden.push_back(new_tensor<T, 2>({rows, weights[l].size(0)}, x));
      hidden.push_back(result.hidden.back().template data<T>());
    }
    result.y = new_tensor<T, 2>({rows, weights.back().size(0)}, x);
    run_forward(given.network, hidden, result.y.template data<T>());
    return result;
  });
}

Gradients backward(
    const Tensor& grad_output,
    const Saved& saved,
    Activation output_activation,
    const Needs& needs) {
  return relu_mlp::dispatch(grad_output.dtype(), [&]<typename T>() {
    const std::size_t layers = needs.layers();
    Operands<T> given;
    given.copies.reserve(2 * layers + 1);
    BackwardPass<T> pass{needs};
    pass.grad_output = matrix<const T>(grad_output);
    const int64_t rows = grad_output.size(0);
    // A superfluous operand leaves at least its shape behind.
    Network<T>& network = given.network;
    network = {{nullptr, rows, 0, 0, 1}, {}, output_activation, activate<T>};
    network.layers.resize(layers);
    int64_t width = grad_output.size(1);
    for (std::size_t l = layers; l-- > 0;) {
      Matrix<const T>& weight = network.layers[l].weight;
      const Tensor *w = saved.weights[l], *input = saved.inputs[l];
      weight = {nullptr, width, 0, 0, 1};
      if (w) {
        weight = given.rows(*w);
      } else if (input) {
        weight.cols = input->size(1);
      }
      width = weight.cols;
    }
    if (saved.inputs[0]) {
      network.x = given.rows(*saved.inputs[0]);
    }
    for (std::size_t l = 1; l < layers; ++l) {
      pass.hidden.push_back(
          saved.inputs[l] ? given.whole(*saved.inputs[l]) : Matrix<const T>{});
    }
    if (saved.y) {
      pass.y = given.rows(*saved.y);
    }
    Gradients gradients = new_gradients(network, grad_output, pass);
    run_backward(network, pass);
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
  return relu_mlp::dispatch(x.dtype(), [&]<typename T>() {
    const Operands<T> given = operands<T>(x, weights, biases, output_activation);
    BackwardPass<T> pass{needs};
    pass.recompute = true;
    pass.grad_output = matrix<const T>(grad_output);
    Gradients gradients = new_gradients(given.network, x, pass);
    run_backward(given.network, pass);
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
  return relu_mlp::dispatch(x.dtype(), [&]<typename T>() {
    Operands<T> given = operands<T>(x, weights, biases, output_activation);
    std::string flags = "0" + std::string(weights.size(), '1');
    for (const Layer<T>& layer : given.network.layers) {
      flags += layer.bias ? '1' : '0';
    }
    BackwardPass<T> pass{Needs{flags}};
    double squares = 0;
    pass.recompute = true;
    pass.target = given.whole(target);
    pass.loss_scale = loss == Loss::sse ? 1.0
        : loss == Loss::half_sse        ? 0.5
                                        : 1.0 / double(target.numel());
    pass.squares = &squares;
    LossAndGradients result{
        empty<0>({}, x), new_gradients(given.network, x, pass)};
    run_backward(given.network, pass);
    *result.loss.template data<T>() =
        T(compute_t<T>(pass.loss_scale * squares));
    return result;
  });
}

} // namespace

const Passes passes{forward, backward, recompute_backward, loss_and_grads, false};

} // namespace relu_mlp::cpu
