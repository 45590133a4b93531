// Describes a network's call for make_plan().
#pragma once

#include "convert.h"
#include "../network.h"
#include "plan.h"

namespace relu_mlp::cpu {

template <typename T>
constexpr Dtype dtype_of = std::is_same_v<T, double> ? Dtype::float64
    : std::is_same_v<T, BFloat16>                    ? Dtype::bfloat16
    : std::is_same_v<T, Half>                        ? Dtype::float16
                                                     : Dtype::float32;

// What an instruction set offers for elements of type T.
template <typename T>
Capabilities capabilities_of(
    const InstructionSet& isa,
    bool has_half_arithmetic) {
  const auto& kernels = kernels_of<T>(isa);
  const bool multiplies_bf16 = std::is_same_v<T, BFloat16> && isa.bf16;
  return {
      dtype_of<T>, multiplies_bf16 ? isa.bf16->kind : Bf16Kind::none,
      kernels.panel, kernels.lanes * int64_t(sizeof(compute_t<T>)),
      has_half_arithmetic};
}

template <typename T>
Call call_of(const Network<T>& network) {
  Call call{
      network.x.rows,
      {},
      capabilities_of<T>(chosen_instruction_set(), has_half_arithmetic()),
      &processor_tuning()};
  call.layers.reserve(network.layers.size());
  for (std::size_t l = 0; l < network.layers.size(); ++l) {
    const Matrix<const T>& weight = network.layers[l].weight;
    const int64_t in = network.width(l);
    // Hidden activations and converted operands are contiguous.
    const bool is_x = l == 0 && !is_16bit<T>;
    call.layers.push_back(
        {in, network.width(l + 1), is_x ? network.x.row_stride : in,
         is_16bit<T> ? in : weight.row_stride});
  }
  return call;
}

} // namespace relu_mlp::cpu
