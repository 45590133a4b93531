#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "../tuning.h"

#ifdef RELU_MLP_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace relu_mlp::cpu {

extern const InstructionSet baseline_set;
#ifdef RELU_MLP_X86
// Weak: setup.py leaves out the file of a set if the compiler fails on it, and
// then the address is null.
#define RELU_MLP_MAYBE __attribute__((weak, visibility("hidden")))
extern const InstructionSet avx2_set RELU_MLP_MAYBE;
extern const InstructionSet avx512_set RELU_MLP_MAYBE;
extern const Bf16Kernels avx512_bf16_kernels RELU_MLP_MAYBE;
extern const Bf16Kernels amx_kernels RELU_MLP_MAYBE;
#endif

namespace {

struct CompiledSet {
  InstructionSet set;
  bool is_supported;
};

#ifdef RELU_MLP_X86
// AVX-512 with kernels that multiply bfloat16.
InstructionSet with_bf16(const char* name, const Bf16Kernels& kernels) {
  InstructionSet set = avx512_set;
  set.name = name;
  set.bfloat16.round = kernels.round;
  set.bfloat16.column_sums = kernels.column_sums;
  set.bf16 = &kernels;
  return set;
}

// The features of leaf 7 that the processor reports in EDX.
unsigned features_in_edx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) ? d : 0;
}

// Whether the processor has AMX for bfloat16, and the system lets this process
// use it.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned needed = 1u << 22 | 1u << 24; // AMX-BF16, AMX-TILE
  constexpr long request = 0x1023, tile_data = 18; // ARCH_REQ_XCOMP_PERM
  return (features_in_edx() & needed) == needed &&
      syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

void add_x86(std::vector<CompiledSet>& all) {
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");

  if (&avx2_set) {
    all.push_back({avx2_set, avx2});
  }
  if (!&avx512_set) {
    return; // the others contain it
  }
  all.push_back({avx512_set, avx512});
  if (&avx512_bf16_kernels) {
    const auto plain = all.end() - 1;
    all.insert(
        processor_tuning().prefers_dpbf16 ? all.end() : plain,
        {with_bf16("avx512_bf16", avx512_bf16_kernels), bf16});
  }
  if (&amx_kernels) {
    all.push_back({with_bf16("amx", amx_kernels), bf16 && has_amx()});
  }
}
#endif

// All compiled instruction sets, the slowest first. This code queries the
// processor, so it must run on every processor.
const std::vector<CompiledSet>& compiled() {
  static const std::vector<CompiledSet> sets = [] {
    std::vector<CompiledSet> all = {{baseline_set, true}};
#ifdef RELU_MLP_X86
    add_x86(all);
#endif
    return all;
  }();
  return sets;
}

const CompiledSet* find(const std::string& name) {
  for (const CompiledSet& one : compiled()) {
    if (name == one.set.name) {
      return &one;
    }
  }
  return nullptr;
}
const InstructionSet* find_supported(const std::string& name) {
  const CompiledSet* const found = find(name);
  return found && found->is_supported ? &found->set : nullptr;
}

const InstructionSet* first_choice() {
  const char* const name = std::getenv("RELU_MLP_ISA");
  if (!name) {
    return find_supported(supported_instruction_sets().back());
  }
  if (const InstructionSet* set = find_supported(name)) {
    return set;
  }
  std::string message = "RELU_MLP_ISA must be one of";
  for (const std::string& supported : supported_instruction_sets()) {
    message += " '" + supported + "'";
  }
  throw std::runtime_error(message + " on this machine, got '" + name + "'");
}

std::atomic<const InstructionSet*> choice = nullptr;

} // namespace

std::vector<std::string> compiled_instruction_sets() {
  std::vector<std::string> names;
  for (const auto& [set, is_supported] : compiled()) {
    names.push_back(set.name);
  }
  return names;
}

std::vector<std::string> supported_instruction_sets() {
  std::vector<std::string> names;
  for (const auto& [set, is_supported] : compiled()) {
    if (is_supported) {
      names.push_back(set.name);
    }
  }
  return names;
}

const InstructionSet* find_compiled(const std::string& name) {
  const CompiledSet* const found = find(name);
  return found ? &found->set : nullptr;
}

const InstructionSet& chosen_instruction_set() {
  const InstructionSet* set = choice.load(std::memory_order_relaxed);
  if (!set) {
    set = first_choice();
    choice = set;
  }
  return *set;
}

bool choose_instruction_set(const std::string& name) {
  const InstructionSet* const set = find_supported(name);
  if (set) {
    choice = set;
  }
  return set;
}

bool has_half_arithmetic() {
#ifdef RELU_MLP_X86
  // Queried once: in a virtual machine cpuid takes microseconds. Clang 14 has
  // no name for this feature, so __builtin_cpu_supports cannot query it.
  static const bool has = [] {
    constexpr unsigned avx512_fp16 = 1u << 23;
    return __builtin_cpu_supports("avx512f") &&
        (features_in_edx() & avx512_fp16);
  }();
  return has;
#else
  return false;
#endif
}

} // namespace relu_mlp::cpu
