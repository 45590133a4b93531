// Forward mode: the operators' values with their tangents. The formulas are
// those of relu_mlp/reference.py (jvp) and relu_mlp/second_order.py
// (backward_jvp).
#pragma once

#include <optional>

#include "direct_passes.h"

namespace relu_mlp::node {

// These compute below the level at which the arguments carry tangents.
// std::nullopt for what Python has to serve, which includes a gradient of an
// argument or of its tangent at that level.

std::optional<ForwardResult> forward_with_tangents(const Call& call);

// The needed gradients only.
std::optional<std::vector<at::Tensor>> backward_with_tangents(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& needs);

} // namespace relu_mlp::node
