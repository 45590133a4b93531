// The table of one instruction set, made of the texts above it.
#pragma once

#include "dots.h"
#include "gemm.h"
#include "convert16.h"
#include "pack.h"

namespace relu_mlp::cpu::RELU_MLP_ISA {
namespace {

template <typename C>
constexpr Kernels<C> kernels = {
    lanes<C>, max_vectors * lanes<C>, product<C>, pack<C>, linear<C>,
    column_sums<C>, bias_relu<C>, mask<C>};

constexpr Format bfloat16 = {
    widen_bfloat16, narrow_bfloat16, relu<0x7f80>, mask<0x7f80>,
    narrow_column_sums<widen_bfloat16>};
constexpr Format half = {
    widen_half, narrow_half, relu<0x7c00>, mask<0x7c00>,
    narrow_column_sums<widen_half>};

} // namespace
} // namespace relu_mlp::cpu::RELU_MLP_ISA
