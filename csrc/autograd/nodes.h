// The autograd nodes. relu_mlp/autograd.py has the same two as Functions, and
// says what each saves and why.
//
//   MLPBackward       the network. Its inputs are the gradients of y and, in
//                     the backward pass of a backward pass, of the hidden
//                     activations
//   GradientBackward  the backward pass, which is differentiable too
#pragma once

#include <torch/csrc/autograd/saved_variable.h>

#include "direct_passes.h"
#include "torch_compat.h"

namespace relu_mlp::node {

// y with a graph; gradients are enabled and some tensor needs one.
at::Tensor recorded_relu_mlp(const Call& call);

// y and a_1 ... a_{L-1}, each with its place in the graph.
ForwardResult recorded_forward(const Call& call);

// The needed gradients, with a graph.
std::vector<at::Tensor> recorded_backward(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& needs);

// Which of (x, y, *weights, *hidden) are saved, in this order
// (reference.is_kept).
std::vector<bool> is_kept(const Needs& needs, bool has_activation);

// Whether gradients are enabled and one of the tensors requires one.
bool needs_gradient(const Call& call);
bool needs_gradient(
    const at::Tensor& tensor,
    const std::vector<at::Tensor>& others);

} // namespace relu_mlp::node
