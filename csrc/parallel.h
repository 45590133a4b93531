// PyTorch's own threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace relu_mlp {

// Calls f(begin, end) for ranges that cover [0, count), on PyTorch's threads
// if there are more than `grain` elements.
template <typename F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count <= grain) {
    f(int64_t(0), count);
  } else {
    torch::stable::parallel_for(0, count, grain, f);
  }
}

} // namespace relu_mlp
