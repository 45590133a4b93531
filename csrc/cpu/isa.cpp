#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace relu_mlp::cpu {

extern const InstructionSet baseline_set;
#if defined(__x86_64__) && defined(__GNUC__)
extern const InstructionSet avx2_set, avx512_set;
#endif

namespace {

struct Compiled {
  const InstructionSet* set;
  bool is_supported;
};

// The plainest first. Whether one is supported is asked here, in code that runs
// everywhere.
const std::vector<Compiled>& compiled() {
  static const std::vector<Compiled> sets = {
      {&baseline_set, true},
#if defined(__x86_64__) && defined(__GNUC__)
      {&avx2_set,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {&avx512_set,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl")},
#endif
  };
  return sets;
}

const InstructionSet* find(const std::string& name) {
  for (const auto& [set, is_supported] : compiled()) {
    if (is_supported && name == set->name) {
      return set;
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
    names.push_back(set->name);
  }
  return names;
}

std::vector<std::string> supported_instruction_sets() {
  std::vector<std::string> names;
  for (const auto& [set, is_supported] : compiled()) {
    if (is_supported) {
      names.push_back(set->name);
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
