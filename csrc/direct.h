// The CPU's passes on plain data, for a library that reads tensors by itself.
//
// csrc/autograd is compiled against one version of PyTorch, so it can build a
// Network from at::Tensor without LibTorch's C interface, whose conversions
// take longer than a small network. It finds relu_mlp_direct() in the library
// that is loaded, and uses it only if both were compiled from the same
// declarations: `layout` has to be equal on both sides.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <string>

#include "network.h"

namespace relu_mlp {

// The passes for elements of type T. Results are contiguous and allocated by
// the caller.
template <typename T>
struct DirectPasses {
  Activate<T> activate; // for Network::activate
  void (*forward)(
      const Network<T>& network,
      const std::vector<T*>& hidden, // a_1 ... a_{L-1}, or empty
      T* y);
  void (*backward)(const Network<T>& network, const BackwardPass<T>& pass);
  void (*vjp)(const Network<T>& network, const VjpPass<T>& pass);
};

struct Direct {
  std::string (*layout)();
  void (*prefer_huge_pages)(void* data, int64_t bytes);
  // One step of trainers on all rows (cpu/train_operator.h). Deletes the
  // handles.
  void (*train)(
      const std::vector<int64_t>& trainers,
      AtenTensorHandle x,
      AtenTensorHandle target,
      AtenTensorHandle losses,
      AtenTensorHandle order,
      const std::vector<double>& hyperparameters,
      double max_norm,
      int64_t batch);
  DirectPasses<float> of_float;
  DirectPasses<double> of_double;
  DirectPasses<torch::headeronly::BFloat16> of_bfloat16;
  DirectPasses<torch::headeronly::Half> of_half;

  template <typename T>
  const DirectPasses<T>& passes() const {
    if constexpr (std::is_same_v<T, float>) {
      return of_float;
    } else if constexpr (std::is_same_v<T, double>) {
      return of_double;
    } else if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
      return of_bfloat16;
    } else {
      return of_half;
    }
  }
};

// The compiled form of the declarations above: which standard library, and the
// sizes of all that is passed.
inline std::string direct_layout() {
  std::string layout =
#if defined(_LIBCPP_VERSION)
      "libc++";
#elif defined(__GLIBCXX__)
      "libstdc++";
#else
      "another standard library";
#endif
  for (const std::size_t size :
       {sizeof(Direct), sizeof(Network<float>), sizeof(Layer<float>),
        sizeof(BackwardPass<float>), sizeof(VjpPass<float>),
        sizeof(std::string)}) {
    layout += ' ' + std::to_string(size);
  }
  return layout;
}

} // namespace relu_mlp
