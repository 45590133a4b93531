// The passes on the CPU.
#pragma once

#include "../passes.h"

namespace relu_mlp::cpu {

extern const Passes passes;

} // namespace relu_mlp::cpu
