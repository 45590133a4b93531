#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace relu_mlp::cpu {

extern const InstructionSet baseline_set;
#if defined(__x86_64__) && defined(__GNUC__)
extern const InstructionSet avx2_set, avx512_set;
extern const PairKernels avx512_bf16_kernels, amx_kernels;
#endif

namespace {

struct Compiled {
  InstructionSet set;
  bool is_supported;
};

#if defined(__x86_64__) && defined(__GNUC__)
// AVX-512, but for bfloat16.
InstructionSet with_pairs(
    InstructionSet set,
    const char* name,
    const PairKernels& kernels) {
  set.name = name;
  set.bfloat16.narrow = kernels.narrow;
  set.bfloat16.column_sums = kernels.column_sums;
  set.pairs = &kernels;
  return set;
}

// Whether the processor has AMX with bfloat16, and the system lets us use it.
bool has_amx() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned bfloat16 = 1u << 22, tile = 1u << 24;
  constexpr long request = 0x1023, tile_data = 18; // ARCH_REQ_XCOMP_PERM
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
      (d & bfloat16) && (d & tile) &&
      syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

void add_x86(std::vector<Compiled>& all) {
  const bool is_amd = __builtin_cpu_is("amd");
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");

  // MKL keeps its fastest kernels for its maker's processors: measured on Zen 4.
  // PyTorch hands float16 to oneDNN only where the processor computes with it, and
  // multiplies it element by element elsewhere.
  InstructionSet of_avx2 = avx2_set, of_avx512 = avx512_set;
  of_avx512.outruns_library = is_amd;
  of_avx2.outruns_library_in_half = of_avx512.outruns_library_in_half =
      !__builtin_cpu_supports("avx512fp16");

  // Dot products of bfloat16 took twice the time of widening on a Sapphire Rapids,
  // and half of it on Zen 4.
  const Compiled widening{of_avx512, avx512};
  const Compiled dots{
      with_pairs(of_avx512, "avx512_bf16", avx512_bf16_kernels), bf16};
  all.push_back({of_avx2, avx2});
  all.push_back(is_amd ? widening : dots);
  all.push_back(is_amd ? dots : widening);
  all.push_back({with_pairs(of_avx512, "amx", amx_kernels), bf16 && has_amx()});
}
#endif

// The slowest first. Whether one is supported is asked here, in code that runs
// everywhere.
const std::vector<Compiled>& compiled() {
  static const std::vector<Compiled> sets = [] {
    std::vector<Compiled> all = {{baseline_set, true}};
#if defined(__x86_64__) && defined(__GNUC__)
    add_x86(all);
#endif
    return all;
  }();
  return sets;
}

const InstructionSet* find(const std::string& name) {
  for (const auto& [set, is_supported] : compiled()) {
    if (is_supported && name == set.name) {
      return &set;
    }
  }
  return nullptr;
}

const InstructionSet* first_choice() {
  const char* const name = std::getenv("RELU_MLP_ISA");
  if (!name) {
    return find(supported_instruction_sets().back());
  }
  if (const InstructionSet* set = find(name)) {
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

const InstructionSet& chosen_instruction_set() {
  const InstructionSet* set = choice.load(std::memory_order_relaxed);
  if (!set) {
    set = first_choice();
    choice = set;
  }
  return *set;
}

bool choose_instruction_set(const std::string& name) {
  const InstructionSet* const set = find(name);
  if (set) {
    choice = set;
  }
  return set;
}

} // namespace relu_mlp::cpu
