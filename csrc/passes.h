// The passes that every device has: the whole forward pass, the whole backward
// pass, and both with a loss in between. boxed.h calls them with arguments that
// it has checked; matrices are 2-D.
#pragma once

#include <string>
#include <vector>

#include "tensor.h"

namespace relu_mlp {

struct ForwardResult {
  Tensor y; // (rows, out_features)
  std::vector<Tensor> hidden; // a_1 ... a_{L-1}, or nothing
};

// The operands of the backward pass. `inputs[l]` is what layer l was applied
// to: x, a_1, ... a_{L-1}. A null pointer stands where `needs` makes the
// operand superfluous.
struct Saved {
  std::vector<const Tensor*> inputs, weights;
  const Tensor* y;
};

// The gradients of x, of every weight and of every bias, in that order; those
// that `needs` does not ask for have no handle.
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

  // The same from x and the parameters alone: the hidden activations are
  // computed again.
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

  // Whether tensors of another device may come: the dispatcher sends a call to
  // the CPU only if all tensors are there.
  bool checks_devices;
};

} // namespace relu_mlp
