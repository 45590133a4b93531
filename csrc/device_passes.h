// The passes of any device. The conversion from tensors to plain data and back
// is the same on every device. A class Device<T> provides the rest. An object
// of it serves one call with elements of type T:
//
//   Device(const Tensor& like)  `like` is on the device. The device is current
//                               for the lifetime of the object
//   needs_contiguous            see Operands
//   unknown_width               see saved_network
//   activate                    see Network
//   new_matrix(rows, cols)      a new contiguous tensor, not initialized
//   forward(network, hidden, y)
//   backward(network, pass)
//   has_vjp                     whether it has vjp(network, pass)
//   serves(loss)                whether backward(network, pass) has this loss
#pragma once

#include "operands.h"

namespace relu_mlp {

template <template <typename> class Device>
struct PassesOf {
  static ForwardResult forward(
      const Tensor& x,
      const std::vector<Tensor>& weights,
      const std::vector<Tensor>& biases,
      Activation output_activation,
      bool save_hidden) {
    return dispatch(x.dtype(), [&]<typename T>() {
      Device<T> device(x);
      Operands<T> operands(1 + 2 * weights.size(), device.needs_contiguous);
      const Network<T> network = whole_network<T>(
          x, weights, biases, output_activation, device.activate, operands);
      const int64_t rows = x.size(0);
      ForwardResult result;
      std::vector<T*> hidden;
      result.hidden.reserve(weights.size());
      hidden.reserve(weights.size());
      for (std::size_t l = 0; save_hidden && l + 1 < weights.size(); ++l) {
        result.hidden.push_back(device.new_matrix(rows, network.width(l + 1)));
        hidden.push_back(result.hidden.back().template data<T>());
      }
      result.y = device.new_matrix(rows, network.width(weights.size()));
      device.forward(network, hidden, result.y.template data<T>());
      return result;
    });
  }

  static Gradients backward(
      const Tensor& grad_output,
      const Saved& saved,
      Activation output_activation,
      const Needs& needs) {
    return dispatch(grad_output.dtype(), [&]<typename T>() {
      Device<T> device(grad_output);
      Operands<T> operands(2 * needs.layers() + 1, device.needs_contiguous);
      BackwardPass<T> pass{needs};
      const Network<T> network = saved_network(
          grad_output, saved, output_activation, device.activate,
          device.unknown_width, operands, pass);
      return run(device, network, grad_output, pass);
    });
  }

  static std::vector<Tensor> backward_vjp(
      const Tensor& grad_output,
      const Saved& saved,
      Activation output_activation,
      const Cotangents& cotangents,
      std::string_view wanted) {
    return dispatch(grad_output.dtype(), [&]<typename T>() {
      Device<T> device(grad_output);
      const std::size_t layers = saved.weights.size();
      Operands<T> operands(4 * layers + 2, device.needs_contiguous);
      VjpPass<T> pass;
      const Network<T> network = saved_network(
          grad_output, saved, output_activation, device.activate,
          device.unknown_width, operands, pass);
      pass.tangents = tangents_of(network, cotangents, operands);

      std::vector<Tensor> results;
      results.reserve(wanted.size());
      auto is_wanted = wanted.begin();
      const auto result_like = [&](const Tensor* operand) -> T* {
        if (!operand || *is_wanted++ == '0') {
          return nullptr;
        }
        results.push_back(
            device.new_matrix(operand->size(0), operand->size(1)));
        return results.back().template data<T>();
      };
      pass.of_grad_output = result_like(&grad_output);
      pass.of_inputs.push_back(result_like(saved.inputs[0]));
      pass.of_y = result_like(saved.y);
      for (const Tensor* weight : saved.weights) {
        pass.of_weights.push_back(result_like(weight));
      }
      for (std::size_t l = 1; l < layers; ++l) {
        pass.of_inputs.push_back(result_like(saved.inputs[l]));
      }
      device.vjp(network, pass);
      return results;
    });
  }

  static Gradients recompute_backward(
      const Tensor& grad_output,
      const Tensor& x,
      const std::vector<Tensor>& weights,
      const std::vector<Tensor>& biases,
      Activation output_activation,
      const Needs& needs) {
    return dispatch(x.dtype(), [&]<typename T>() {
      Device<T> device(x);
      Operands<T> operands(1 + 2 * weights.size(), device.needs_contiguous);
      const Network<T> network = whole_network<T>(
          x, weights, biases, output_activation, device.activate, operands);
      BackwardPass<T> pass{needs};
      pass.recompute = true;
      pass.grad_output = matrix<const T>(grad_output);
      return run(device, network, x, pass);
    });
  }

  static LossAndGradients loss_and_grads(
      const Tensor& x,
      const Tensor& target,
      const std::vector<Tensor>& weights,
      const std::vector<Tensor>& biases,
      Loss loss,
      Activation output_activation) {
    return dispatch(x.dtype(), [&]<typename T>() {
      if (!Device<T>::serves(loss)) {
        fail(
            "relu_mlp::loss_and_grads has no kernel for the loss '",
            loss_names[int(loss)],
            "' on this device. relu_mlp.loss_and_grads serves it.");
      }
      Device<T> device(x);
      Operands<T> operands(2 + 2 * weights.size(), device.needs_contiguous);
      const Network<T> network = whole_network<T>(
          x, weights, biases, output_activation, device.activate, operands);
      const std::string flags = needs_of_loss(network);
      BackwardPass<T> pass{Needs{flags}};
      pass.recompute = true;
      LossAndGradients result{empty<0>({}, x), {}};
      set_loss(
          pass, loss, operands.target(target), result.loss.template data<T>());
      result.gradients = run(device, network, x, pass);
      return result;
    });
  }

 private:
  // Runs `pass`, which is complete except for the pointers to its results.
  template <typename T>
  static Gradients run(
      Device<T>& device,
      const Network<T>& network,
      const Tensor& like,
      BackwardPass<T>& pass) {
    Gradients gradients =
        new_gradients(network, like, pass, [&](int64_t rows, int64_t cols) {
          return device.new_matrix(rows, cols);
        });
    device.backward(network, pass);
    return gradients;
  }
};

// For `checks_devices` see Passes.
template <template <typename> class Device>
constexpr Passes passes_of(bool checks_devices) {
  using Of = PassesOf<Device>;
  Passes passes{
      Of::forward,        Of::backward,  nullptr, Of::recompute_backward,
      Of::loss_and_grads, checks_devices};
  if constexpr (Device<float>::has_vjp) {
    passes.backward_vjp = Of::backward_vjp;
  }
  return passes;
}

} // namespace relu_mlp
