// The instruction sets that this library has kernels for, and which of them it
// uses. The choice is made once, when it is first asked for.
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
  const Bf16Kernels* bf16 = nullptr; // null where nothing multiplies bfloat16
};

// Those that were compiled, the slowest on this processor first.
std::vector<std::string> compiled_instruction_sets();
// Of these, the ones that the processor has.
std::vector<std::string> supported_instruction_sets();

// One that was compiled, whether the processor has it or not; null if there is
// none of that name.
const InstructionSet* find_compiled(const std::string& name);

// The fastest that the processor has, or the one that RELU_MLP_ISA names.
const InstructionSet& chosen_instruction_set();

// Chooses another one, for tests. Returns false if there is none of that name
// or the processor lacks it.
bool choose_instruction_set(const std::string& name);

// Whether the processor computes in float16 (AVX512-FP16) rather than only
// converting it.
bool has_half_arithmetic();

// The kernels of an instruction set that compute what is stored as T: in double
// for double, in float for everything else.
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
