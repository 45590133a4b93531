#include "squared_relu.h"

Tensor squared_relu_cpu(const Tensor& x) {
  return map(x, [](const auto* from, auto* to, int64_t numel) {
    torch::stable::parallel_for(0, numel, 32768, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] = squared_relu(from[i]);
    });
  });
}

STABLE_TORCH_LIBRARY(squared_relu, m) { m.def("squared_relu(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(squared_relu, CPU, m) {
  m.impl("squared_relu", TORCH_BOX(&squared_relu_cpu));
}
