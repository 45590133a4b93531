// The whole forward pass, the whole backward pass, and both with a loss in
// between. The arguments have been checked by ops.cpp; matrices are 2-D.
#pragma once

#include "../tensor.h"

namespace relu_mlp::cpu {

struct ForwardResult {
  Tensor y; // (rows, out_features)
  std::vector<Tensor> hidden; // a_1 ... a_{L-1}, or nothing
};

// `biases` is empty or has one entry per layer; an entry without elements
// stands for a missing bias.
ForwardResult forward(
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases,
    Activation output_activation,
    bool save_hidden);

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

Gradients backward(
    const Tensor& grad_output,
    const Saved& saved,
    Activation output_activation,
    const Needs& needs);

// The same from x and the parameters alone: the hidden activations are computed
// again, block by block.
Gradients recompute_backward(
    const Tensor& grad_output,
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases,
    Activation output_activation,
    const Needs& needs);

struct LossAndGradients {
  Tensor loss; // ()
  Gradients gradients;
};

LossAndGradients loss_and_grads(
    const Tensor& x,
    const Tensor& target,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases,
    Loss loss,
    Activation output_activation);

} // namespace relu_mlp::cpu
