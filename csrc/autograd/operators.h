// The operators of torch.ops.relu_mlp as C++ functions. A call goes through
// PyTorch's dispatcher, with all that is active in this thread.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "call.h"

namespace relu_mlp::node::operators {

at::Tensor relu_mlp(const Call& call);

// y and, if they are to be saved, a_1 ... a_{L-1}.
std::tuple<at::Tensor, std::vector<at::Tensor>> forward(
    const Call& call,
    bool save_hidden);

// The needed gradients only, in the order of `needs`.
std::vector<at::Tensor> backward(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& needs);

std::vector<at::Tensor> recompute_backward(
    const at::Tensor& grad_output,
    const Call& call,
    const std::string& needs);

} // namespace relu_mlp::node::operators
