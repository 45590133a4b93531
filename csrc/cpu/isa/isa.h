// The instruction sets that this library has kernels for, and which of them it
// uses. The choice is made once, at its first use.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

#include "../kernels/kernels.h"

// Kernels for x86 need the target attributes of GCC and Clang.
#if defined(__x86_64__) && defined(__GNUC__)
#define RELU_MLP_X86
#endif

namespace relu_mlp::cpu {

// All kernels of one instruction set.
struct InstructionSet {
  const char* name;
  Kernels<float> float_kernels;
  Kernels<double> double_kernels;
  Kernels16 bfloat16, half;
  const Bf16Kernels* bf16 = nullptr; // null if nothing multiplies bfloat16
};

// The names of the compiled instruction sets, the slowest on this processor
// first.
std::vector<std::string> compiled_instruction_sets();
// Those that the processor supports.
std::vector<std::string> supported_instruction_sets();

// A compiled instruction set, whether the processor supports it or not; null if
// there is none of this name.
const InstructionSet* find_compiled(const std::string& name);

// The fastest supported instruction set, or the one that RELU_MLP_ISA names.
const InstructionSet& chosen_instruction_set();

// Chooses another instruction set, for tests. Returns false if there is none of
// this name or the processor does not support it.
bool choose_instruction_set(const std::string& name);

// Whether the processor computes in float16 (AVX512-FP16) rather than only
// converting it.
bool has_half_arithmetic();

// The kernels of an instruction set for elements of type T: they compute in
// double for double, in float for everything else.
template <typename T>
const auto& kernels_of(const InstructionSet& isa) {
  if constexpr (std::is_same_v<T, double>) {
    return isa.double_kernels;
  } else {
    return isa.float_kernels;
  }
}
template <typename T>
const auto& chosen_kernels() {
  return kernels_of<T>(chosen_instruction_set());
}

} // namespace relu_mlp::cpu
