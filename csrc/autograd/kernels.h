#pragma once

namespace relu_mlp::node {

// Whether the nodes serve calls. Otherwise all of them go to Python.
extern bool is_enabled;

// Registers the nodes on the Autograd key of relu_mlp, forward and backward.
void register_kernels();

} // namespace relu_mlp::node
