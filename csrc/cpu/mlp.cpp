#include "mlp.h"

#include <algorithm>

#include "elementwise.h"
#include "products.h"

namespace relu_mlp::cpu {
namespace {

// Elements per task of the element-wise loops: at::internal::GRAIN_SIZE.
constexpr int64_t grain = 32768;

// Calls f<activation>() for an activation known only at run time.
template <typename F>
void dispatch(Activation activation, const F& f) {
  switch (activation) {
    case Activation::none:
      return f.template operator()<Activation::none>();
    case Activation::relu:
      return f.template operator()<Activation::relu>();
    case Activation::sigmoid:
      return f.template operator()<Activation::sigmoid>();
    case Activation::tanh:
      return f.template operator()<Activation::tanh>();
  }
}

// a = max(z, 0) in place.
template <typename T>
void relu_(const Tensor& z) {
  T* const data = z.data<T>();
  parallel_for(z.numel(), grain, [&](int64_t begin, int64_t end) {
    relu(data, begin, end);
  });
}

// Calls an in-place operator of PyTorch, so that the transcendental functions
// have its accuracy and its speed.
void call_inplace(const char* name, const Tensor& z) {
  AtenTensorHandle argument;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(z.get(), &argument));
  StableIValue stack = torch::stable::detail::from(argument);
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name, "", &stack, TORCH_ABI_VERSION));
  Tensor(torch::stable::detail::to<AtenTensorHandle>(stack));
}

// y = phi(z) in place.
template <typename T>
void activate_(const Tensor& z, Activation activation) {
  switch (activation) {
    case Activation::none:
      return;
    case Activation::relu:
      return relu_<T>(z);
    case Activation::sigmoid:
      return call_inplace("aten::sigmoid_", z);
    case Activation::tanh:
      return call_inplace("aten::tanh_", z);
  }
}

// delta = delta where a > 0 or NaN, else 0, in place.
template <typename T>
void relu_backward_(const Tensor& delta, const Tensor& a) {
  Tensor holder;
  T* const data = delta.data<T>();
  const T* const active = as_contiguous(a, holder).data<const T>();
  parallel_for(delta.numel(), grain, [&](int64_t begin, int64_t end) {
    relu_backward(data, active, begin, end);
  });
}

// delta_L = grad_output * phi'(z_L)
template <typename T>
Tensor output_delta(
    const Tensor& grad_output,
    const Tensor& y,
    Activation activation) {
  const auto grad = matrix<const T>(grad_output);
  Tensor delta = empty<2>({grad.rows, grad.cols}, grad_output);
  Tensor holder;
  T* const to = delta.data<T>();
  const T* const from = as_contiguous(y, holder).data<const T>();
  const int64_t rows_per_task =
      std::max<int64_t>(1, grain / std::max<int64_t>(1, grad.cols));
  dispatch(activation, [&]<Activation phi>() {
    parallel_for(grad.rows, rows_per_task, [&](int64_t begin, int64_t end) {
      activation_backward<phi>(to, grad, from, begin, end);
    });
  });
  return delta;
}

template <typename T>
ForwardResult forward_as(
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases,
    Activation output_activation,
    bool save_hidden) {
  const std::size_t layers = weights.size();
  const int64_t rows = x.size(0);
  std::vector<Tensor> hidden;
  hidden.reserve(save_hidden ? layers - 1 : 0);
  const Tensor* a = &x;
  Tensor current; // what `a` points to, where it is neither x nor saved
  for (std::size_t l = 0; l < layers; ++l) {
    Tensor z = empty<2>({rows, weights[l].size(0)}, x);
    const bool has_bias = !biases.empty() && biases[l].numel() > 0;
    linear<T>(z, *a, weights[l], has_bias ? &biases[l] : nullptr);
    if (l + 1 == layers) {
      activate_<T>(z, output_activation);
      return {std::move(z), std::move(hidden)};
    }
    relu_<T>(z);
    if (save_hidden) {
      a = &hidden.emplace_back(std::move(z));
    } else {
      current = std::move(z);
      a = &current;
    }
  }
  fail("relu_mlp: no layers");
}

// The backward pass from delta_L = d loss / d z_L down.
template <typename T>
Gradients propagate(
    const Tensor& delta_L,
    const Saved& saved,
    const Needs& needs) {
  const std::size_t lowest = needs.lowest_layer();
  const int64_t rows = delta_L.size(0);
  const Tensor* at = &delta_L; // delta_l
  Tensor current; // what `at` points to below the last layer
  Gradients gradients(1 + 2 * needs.layers());
  for (std::size_t l = needs.layers(); l-- > lowest;) {
    const Tensor& delta = *at;
    const int64_t out_features = delta.size(1);
    if (needs.weight(l)) {
      const Tensor& input = *saved.inputs[l];
      Tensor& grad = gradients[1 + l];
      grad = empty<2>({out_features, input.size(1)}, delta);
      grad_weight<T>(grad, delta, input);
    }
    if (needs.bias(l)) {
      Tensor& grad = gradients[1 + needs.layers() + l];
      grad = empty<1>({out_features}, delta);
      grad_bias<T>(grad, delta);
    }
    if (needs.propagation_through(l)) {
      const Tensor& weight = *saved.weights[l];
      Tensor below = empty<2>({rows, weight.size(1)}, delta);
      grad_input<T>(below, delta, weight);
      if (l > 0) {
        relu_backward_<T>(below, *saved.inputs[l]);
      }
      current = std::move(below);
      at = &current;
    }
  }
  if (needs.x()) {
    gradients[0] = std::move(current);
  }
  return gradients;
}

// delta_L = d loss / d z_L, in the memory of y, and the value of the loss.
// Blocks of fixed size have sums of their own, which are added up in order, so
// any number of threads gives the same bits.
template <typename T>
Tensor loss_and_delta_(
    const Tensor& y,
    const Tensor& target,
    Loss loss,
    Activation output_activation) {
  // loss = scale * sum (y - t)^2; d loss / d y = 2 * scale * (y - t)
  const int64_t count = y.numel();
  const double scale = loss == Loss::sse ? 1.0
      : loss == Loss::half_sse           ? 0.5
                                         : 1.0 / double(count);
  Tensor holder;
  T* const delta = y.data<T>();
  const T* const t = as_contiguous(target, holder).data<const T>();
  const int64_t blocks = std::max<int64_t>(1, (count + grain - 1) / grain);
  std::vector<double> sums(blocks);
  dispatch(output_activation, [&]<Activation phi>() {
    parallel_for(blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        sums[b] = squared_error<phi>(
            delta, delta, t, 2.0 * scale, b * grain,
            std::min(count, (b + 1) * grain));
      }
    });
  });
  double sum = 0;
  for (const double block_sum : sums) {
    sum += block_sum;
  }
  Tensor value = empty<0>({}, y);
  *value.data<T>() = T(compute_t<T>(scale * sum));
  return value;
}

} // namespace

ForwardResult forward(
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases,
    Activation output_activation,
    bool save_hidden) {
  return relu_mlp::dispatch(x.dtype(), [&]<typename T>() {
    return forward_as<T>(x, weights, biases, output_activation, save_hidden);
  });
}

Gradients backward(
    const Tensor& grad_output,
    const Saved& saved,
    Activation output_activation,
    const Needs& needs) {
  return relu_mlp::dispatch(grad_output.dtype(), [&]<typename T>() {
    if (output_activation == Activation::none) {
      return propagate<T>(grad_output, saved, needs);
    }
    return propagate<T>(
        output_delta<T>(grad_output, *saved.y, output_activation), saved,
        needs);
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
    const ForwardResult result =
        forward_as<T>(x, weights, biases, output_activation, true);
    Tensor value =
        loss_and_delta_<T>(result.y, target, loss, output_activation);

    Saved saved{{&x}, {}, nullptr};
    std::string flags = "0" + std::string(weights.size(), '1');
    for (const Tensor& a : result.hidden) {
      saved.inputs.push_back(&a);
    }
    for (std::size_t l = 0; l < weights.size(); ++l) {
      saved.weights.push_back(&weights[l]);
      flags += !biases.empty() && biases[l].numel() > 0 ? '1' : '0';
    }
    return LossAndGradients{
        std::move(value), propagate<T>(result.y, saved, Needs{flags})};
  });
}

} // namespace relu_mlp::cpu
