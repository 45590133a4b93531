// The batching rules: vmap of the operators. relu_mlp/batching.py has the same
// rules and serves what these do not, which is weights that differ.
#pragma once

namespace relu_mlp::node {

// Registers the rules of relu_mlp, forward and backward.
void register_batching_rules();

} // namespace relu_mlp::node
