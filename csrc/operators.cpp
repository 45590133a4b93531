// torch.ops.relu_mlp: information about this library, and the registration of
// the operators for each device.

#include "operators.h"

#include <algorithm>

#include "cpu/isa/isa.h"
#include "cpu/passes.h"
#include "cpu/train_operator.h"
#include "registration.h"
#ifdef RELU_MLP_WITH_CUDA
#include <cuda_runtime_api.h>

#include "cuda/passes.h"
#endif

namespace relu_mlp {
namespace {

#define RELU_MLP_TEXT(names) RELU_MLP_TEXT_OF(names)
#define RELU_MLP_TEXT_OF(names) #names

// Describes how this library was built and what it contains, as lines of "key:
// value". relu_mlp.build_info() returns this. relu_mlp/ops/library.py compares
// the activations with those of relu_mlp/activations.py.
std::string build_info() {
  std::ostringstream text;
#if defined(__clang__)
  text << "compiler: Clang " << __clang_version__ << '\n';
#elif defined(__GNUC__)
  text << "compiler: GCC " << __VERSION__ << '\n';
#elif defined(_MSC_VER)
  text << "compiler: MSVC " << _MSC_VER << '\n';
#endif
  text << "oldest_torch: " << ((TORCH_TARGET_VERSION >> 56) & 0xff) << '.'
       << ((TORCH_TARGET_VERSION >> 48) & 0xff) << '\n';
  text << "instruction_sets:";
  for (const std::string& name : cpu::compiled_instruction_sets()) {
    text << ' ' << name;
  }
  text << "\nsupported_instruction_sets:";
  for (const std::string& name : cpu::supported_instruction_sets()) {
    text << ' ' << name;
  }
  text << "\noutput_activations:";
  for (const std::string_view name : activation_names) {
    text << ' ' << name;
  }
  text << '\n';
#ifdef RELU_MLP_WITH_CUDA
  text << "cuda: " << CUDART_VERSION / 1000 << '.' << CUDART_VERSION % 1000 / 10
       << "\ncuda_architectures: " << RELU_MLP_TEXT(RELU_MLP_CUDA_ARCHITECTURES)
       << '\n';
#endif
  return text.str();
}

// The index of the instruction set in use among the compiled ones. It can
// change, so build_info does not report it. This is a number and not a name
// because LibTorch leaks the strings that operators return.
int64_t instruction_set() {
  const std::vector<std::string> names = cpu::compiled_instruction_sets();
  const std::string chosen = cpu::chosen_instruction_set().name;
  return std::find(names.begin(), names.end(), chosen) - names.begin();
}

const Registration registration(
    "relu_mlp",
    "csrc/operators.cpp",
    [](Registration::Library& m) {
      define_operators(m);
      m.def("_build_info() -> str");
      m.def("_instruction_set() -> int");
      cpu::define_training(m);
    },
    {
        {"CompositeExplicitAutograd",
         [](Registration::Library& m) {
           m.impl("_build_info", boxed<build_info>);
           m.impl("_instruction_set", boxed<instruction_set>);
           cpu::register_delete_trainer(m);
         }},
        {"CPU",
         [](Registration::Library& m) {
           register_operators<cpu::passes>(m);
           cpu::register_training(m);
         }},
#ifdef RELU_MLP_WITH_CUDA
        {"CUDA", register_operators<cuda::passes>},
#endif
    });

} // namespace
} // namespace relu_mlp
