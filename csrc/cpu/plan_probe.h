// What tests ask about plans.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace relu_mlp::cpu {

// The plan of a network with contiguous operands as lines of "key: value".
// `widths` are those of x, of every hidden layer and of y. dtype is one of
// float32, float64, bfloat16 and float16. The instruction set is one that was
// compiled, and the family one that tuning.cpp has a row for; the processor
// need not have either. If both are empty, they are the chosen set and this
// processor, whatever has_half_arithmetic says.
std::string probe_plan(
    int64_t rows,
    std::vector<int64_t> widths,
    std::string dtype,
    std::string instruction_set,
    std::string family,
    bool has_half_arithmetic);

} // namespace relu_mlp::cpu
