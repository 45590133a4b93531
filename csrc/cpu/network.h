// What a pass on the CPU does with the layers of a network.
#pragma once

#include "../network.h"

namespace relu_mlp::cpu {

// Which layers a pass applies, and through which it propagates delta.
struct Uses {
  bool forward;
  const Needs* needs; // null in a forward pass

  bool backward(std::size_t l) const {
    return needs && l >= needs->lowest_layer() && needs->propagation_through(l);
  }
};

} // namespace relu_mlp::cpu
