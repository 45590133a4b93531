// The passes on the CPU.
#pragma once

#include "../network.h"
#include "../passes.h"

namespace relu_mlp::cpu {

extern const Passes passes;

// The backward pass on plain data. T is a dtype of the operators.
template <typename T>
void run_backward(const Network<T>& network, const BackwardPass<T>& pass);

// z = phi(z) for `count` contiguous elements.
template <typename T>
void activate(Activation phi, T* z, int64_t count);

} // namespace relu_mlp::cpu
