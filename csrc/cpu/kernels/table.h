// The tables of one instruction set, filled with the kernels of the headers
// below.
#pragma once

#include "convert16.h"
#include "dots.h"
#include "gemm.h"
#include "losses.h"
#include "pack.h"
#include "update.h"

namespace relu_mlp::cpu::RELU_MLP_ISA {
namespace {

// A kernel that a table leaves out would be null.
#pragma GCC diagnostic push
#pragma GCC diagnostic error "-Wmissing-field-initializers"

template <typename C>
constexpr Kernels<C> kernels = {
    lanes<C>,
    max_vectors* lanes<C>,
    max_rows(max_vectors),
    product<C>,
    pack<C>,
    linear_by_dots<C>,
    column_sums<C>,
    bias_relu<C>,
    mask<C>,
    sgd<C>,
    adam<C>,
    softmax<C>,
    element_loss<AbsoluteError, C>,
    element_loss<HuberError, C>,
    element_loss<BinaryCrossEntropy, C>};

constexpr Kernels16 bfloat16 = {
    widen_bfloat16, round_to_bfloat16, relu<0x7f80>, mask<0x7f80>,
    column_sums_16bit<widen_bfloat16>};
constexpr Kernels16 half = {
    widen_half, round_to_half, relu<0x7c00>, mask<0x7c00>,
    column_sums_16bit<widen_half>};

#pragma GCC diagnostic pop

} // namespace
} // namespace relu_mlp::cpu::RELU_MLP_ISA
