// The passes that every device implements: the whole forward pass, the whole
// backward pass, and both with a loss in between. The operators check the
// arguments before they call a pass. x, y, the gradient of y and the target are
// matrices, but classes are a target (rows), or () for one row.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "tensor.h"

namespace relu_mlp {

struct ForwardResult {
  Tensor y; // (rows, out_features)
  std::vector<Tensor> hidden; // a_1 ... a_{L-1} if they are saved, else empty
};

// The operands of the backward pass. `inputs[l]` is the input of layer l: x,
// a_1, ... a_{L-1}. An operand that `needs` does not require is null.
struct Saved {
  std::vector<const Tensor*> inputs, weights;
  const Tensor* y;
};

// The gradients that reach the results of a backward pass: those of x, of every
// weight and of every bias. A null pointer is 0.
struct Cotangents {
  const Tensor* x;
  std::vector<const Tensor*> weights, biases;
};

// The gradients of x, of every weight and of every bias, in that order. A
// gradient that is not needed has no handle.
using Gradients = std::vector<Tensor>;

struct LossAndGradients {
  Tensor loss; // ()
  Gradients gradients;
};

// The passes of one device.
struct Passes {
  // `biases` is empty or has one entry per layer; an entry without elements
  // stands for a missing bias.
  ForwardResult (*forward)(
      const Tensor& x,
      const std::vector<Tensor>& weights,
      const std::vector<Tensor>& biases,
      Activation output_activation,
      bool save_hidden);

  Gradients (*backward)(
      const Tensor& grad_output,
      const Saved& saved,
      Activation output_activation,
      const Needs& needs);

  // The vector-Jacobian product of `backward`. `wanted` has a '1' for every
  // wanted gradient: of grad_output, then of every operand in `saved`, in the
  // order x, y, the weights, a_1 ... a_{L-1}. Returns those. Null if the device
  // has no such pass; then the formulas in Python serve it.
  std::vector<Tensor> (*backward_vjp)(
      const Tensor& grad_output,
      const Saved& saved,
      Activation output_activation,
      const Cotangents& cotangents,
      std::string_view wanted);

  // `backward` from x and the parameters alone: it recomputes the hidden
  // activations.
  Gradients (*recompute_backward)(
      const Tensor& grad_output,
      const Tensor& x,
      const std::vector<Tensor>& weights,
      const std::vector<Tensor>& biases,
      Activation output_activation,
      const Needs& needs);

  LossAndGradients (*loss_and_grads)(
      const Tensor& x,
      const Tensor& target,
      const std::vector<Tensor>& weights,
      const std::vector<Tensor>& biases,
      Loss loss,
      Activation output_activation);

  // Whether the operators must check devices. The dispatcher calls the CPU
  // kernel only if all tensors are on the CPU. The kernels of another device
  // may get tensors on several devices.
  bool checks_devices;
};

} // namespace relu_mlp
