// Plans as text, for tests.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace relu_mlp::cpu {

// Returns the plan of a network with contiguous operands as lines of "key:
// value". `widths` has the widths of x, of every hidden layer and of y. dtype
// is one of float32, float64, bfloat16 and float16. The instruction set must be
// compiled, and tuning.cpp must have a row for the family; the processor may
// lack both. If both are empty, the chosen instruction set and this processor
// are used, and has_half_arithmetic is ignored.
std::string probe_plan(
    int64_t rows,
    std::vector<int64_t> widths,
    std::string dtype,
    std::string instruction_set,
    std::string family,
    bool has_half_arithmetic);

} // namespace relu_mlp::cpu
