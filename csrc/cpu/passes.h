// The passes on the CPU.
#pragma once

#include "../network.h"
#include "../passes.h"
#include "plan.h"

namespace relu_mlp::cpu {

extern const Passes passes;

// The plan of a pass of this network, and the backward pass by that plan. A plan
// serves all networks of the same shapes and strides. T is a dtype of the
// operators.
template <typename T>
Plan plan_of(const Network<T>& network);
template <typename T>
void run_backward(
    const Network<T>& network,
    const Plan& plan,
    const BackwardPass<T>& pass);

// z = phi(z) for `count` contiguous elements.
template <typename T>
void activate(Activation phi, T* z, int64_t count);

} // namespace relu_mlp::cpu
