#include "plan_probe.h"

#include <sstream>
#include <utility>

#include "../error.h"
#include "call.h"

namespace relu_mlp::cpu {
namespace {

Capabilities capabilities(
    const std::string& dtype,
    const InstructionSet& isa,
    bool has_half_arithmetic) {
  if (dtype == "float32") {
    return capabilities_of<float>(isa, has_half_arithmetic);
  }
  if (dtype == "float64") {
    return capabilities_of<double>(isa, has_half_arithmetic);
  }
  if (dtype == "bfloat16") {
    return capabilities_of<BFloat16>(isa, has_half_arithmetic);
  }
  if (dtype == "float16") {
    return capabilities_of<Half>(isa, has_half_arithmetic);
  }
  fail("no dtype '", dtype, "'");
}

const char* name_of(LayersKind kind) {
  switch (kind) {
    case LayersKind::packed:
      return "packed";
    case LayersKind::bf16:
      return "bf16";
    case LayersKind::bf16_one_block:
      return "bf16_one_block";
    case LayersKind::library:
      return "library";
  }
  fail("no such layers");
}

std::string describe(const Plan& plan) {
  constexpr const char* packs[] = {"none", "view", "once", "per_use", "left"};
  constexpr std::pair<const char*, Pack LayerPacking::*> products[] = {
      {"forward", &LayerPacking::forward},
      {"grad_input", &LayerPacking::grad_input},
      {"grad_weight", &LayerPacking::grad_weight}};
  std::ostringstream text;
  text << "candidate: " << plan.candidate
       << "\nlayers: " << name_of(plan.layers) << "\nblock: " << plan.block
       << "\nchunk: " << plan.chunk << "\nchunks: " << plan.chunks;
  for (const auto& [name, member] : products) {
    text << '\n' << name << ':';
    for (const LayerPacking& layer : plan.packing) {
      text << ' ' << packs[int(layer.*member)];
    }
  }
  text << '\n';
  return text.str();
}

} // namespace

std::string probe_plan(
    int64_t rows,
    std::vector<int64_t> widths,
    std::string dtype,
    std::string instruction_set,
    std::string family,
    bool has_half_arithmetic) {
  const bool is_here = instruction_set.empty() && family.empty();
  const InstructionSet* const isa =
      is_here ? &chosen_instruction_set() : find_compiled(instruction_set);
  const Tuning* const tuning =
      is_here ? &processor_tuning() : find_tuning(family);
  if (is_here) {
    has_half_arithmetic = cpu::has_half_arithmetic();
  }
  if (!isa || !tuning || widths.size() < 2) {
    fail(
        "no instruction set '", instruction_set, "', no family '", family,
        "', or no layer");
  }
  Call call{rows, {}, capabilities(dtype, *isa, has_half_arithmetic), tuning};
  for (std::size_t l = 0; l + 1 < widths.size(); ++l) {
    call.layers.push_back({widths[l], widths[l + 1], widths[l], widths[l]});
  }
  return describe(make_plan(call));
}

} // namespace relu_mlp::cpu
