// The passes on a GPU.
#pragma once

#include "../passes.h"

namespace relu_mlp::cuda {

extern const Passes passes;

} // namespace relu_mlp::cuda
