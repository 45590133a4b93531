// The direct road: from tensors to the CPU's passes on plain data.
//
// Each function returns std::nullopt for arguments that it does not know to be
// right. The operators then serve the call, or say what is wrong with it.
#pragma once

#include <optional>

#include "../direct.h"
#include "call.h"

namespace relu_mlp::node {

// The passes of the library that is loaded; null if it fits not this one.
extern const Direct* direct;

struct ForwardResult {
  at::Tensor y; // (*, out_features)
  std::vector<at::Tensor> hidden; // a_1 ... a_{L-1}, (rows, features)
};

std::optional<ForwardResult> direct_forward(const Call& call, bool save_hidden);

// The gradients of x, of every weight and of every bias; undefined where not
// needed. `saved` is as the operator `backward` takes it. `grad_hidden` is
// empty, or has a gradient for each of a_1 ... a_{L-1}, which may be undefined.
using Gradients = std::vector<at::Tensor>;

// `needs` has to be well-formed (is_needs).
std::optional<Gradients> direct_backward(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& needs,
    const std::vector<at::Tensor>& grad_hidden);

// The gradients of grad_output and of each of `saved`, undefined where not
// wanted, for gradients `cotangents` of the results of the backward pass. These
// may be undefined, which is 0.
std::optional<std::vector<at::Tensor>> direct_vjp(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& needs,
    const std::vector<at::Tensor>& cotangents,
    const std::vector<bool>& wanted);

// Whether this is a tensor of the CPU with finite elements only.
bool is_finite(const at::Tensor& tensor);

// Whether the derivative phi' of an activation is not piecewise constant.
bool has_curvature(const std::string& activation);

// Whether this is one character '0' or '1' for x, every weight and every bias.
bool is_needs(const std::string& needs);

// The same from x and the parameters.
std::optional<Gradients> direct_recompute_backward(
    const at::Tensor& grad_output,
    const Call& call,
    const std::string& needs);

} // namespace relu_mlp::node
