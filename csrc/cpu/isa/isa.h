// The choice of an instruction set, made once, when it is first asked for.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <string>
#include <type_traits>
#include <vector>

#include "../kernels/kernels.h"

namespace relu_mlp::cpu {

using torch::headeronly::BFloat16;

// All that one instruction set offers.
struct InstructionSet {
  const char* name;
  Kernels<float> float_kernels;
  Kernels<double> double_kernels;
  Format bfloat16, half;
  const PairKernels* pairs = nullptr; // where bfloat16 is multiplied in pairs
  // Whether products of any size are faster than PyTorch's on this processor: of float
  // and double, and of float16.
  bool outruns_library = false, outruns_library_in_half = false;
};

// The names of those that were compiled, the slowest on this processor first.
std::vector<std::string> compiled_instruction_sets();
// Of these, the ones that the processor has.
std::vector<std::string> supported_instruction_sets();

// The best that the processor has, or the one that RELU_MLP_ISA names.
const InstructionSet& chosen_instruction_set();

// Chooses another one: for tests. False if there is none of that name or the
// processor lacks it.
bool choose_instruction_set(const std::string& name);

// The kernels for numbers stored as T.
template <typename T>
auto& chosen_kernels() {
  const InstructionSet& isa = chosen_instruction_set();
  if constexpr (std::is_same_v<T, double>) {
    return isa.double_kernels;
  } else {
    return isa.float_kernels;
  }
}

} // namespace relu_mlp::cpu
