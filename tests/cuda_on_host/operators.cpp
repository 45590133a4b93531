// The operators of the passes in csrc/cuda, compiled for the host, on CPU
// tensors: torch.ops.relu_mlp_cuda_on_host. It also has operators with which
// tests set and read the emulator's state.

#include "../../csrc/operators.h"
#include "../../csrc/cuda/machine.h"
#include "../../csrc/cuda/passes.h"

namespace relu_mlp {
namespace {

// `seed` shuffles the order in which threads and blocks run.
void set_machine(int64_t seed, std::vector<int64_t> device) {
  cuda::emulator::settings() = {
      uint64_t(seed),
      {int(device.at(0)), int(device.at(1)), int(device.at(2))}};
}

int64_t launches() {
  return cuda::emulator::launches();
}

} // namespace
} // namespace relu_mlp

STABLE_TORCH_LIBRARY(relu_mlp_cuda_on_host, m) {
  relu_mlp::define_operators(m);
  m.def("set_machine(int seed, int[] device) -> ()");
  m.def("launches() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(relu_mlp_cuda_on_host, CompositeExplicitAutograd, m) {
  m.impl("set_machine", TORCH_BOX(&relu_mlp::set_machine));
  m.impl("launches", TORCH_BOX(&relu_mlp::launches));
}

STABLE_TORCH_LIBRARY_IMPL(relu_mlp_cuda_on_host, CPU, m) {
  relu_mlp::register_operators<relu_mlp::cuda::passes>(m);
}
