// The operator `_train`: its arguments taken from the stack and checked.
// relu_mlp/training.py has the loop around it.
#pragma once

#include "../stack.h"

namespace relu_mlp::cpu {

void train_operator(StableIValue* stack);

} // namespace relu_mlp::cpu
