// The kernels for AVX-512 with dot products of bfloat16: AMD since 2022 (Zen
// 4), Intel servers since 2020 (Cooper Lake).
#include "isa.h"
#ifdef RELU_MLP_X86

#define RELU_MLP_ISA avx512_bf16
#define RELU_MLP_TARGET \
  "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16"
#define RELU_MLP_VECTOR_BYTES 64
#define RELU_MLP_VECTOR_REGISTERS 32
#include "begin_target.h"
#include "../kernels/bf16_dot.h"

namespace relu_mlp::cpu {

// Added to avx512_set (isa.cpp).
extern const Bf16Kernels avx512_bf16_kernels = {
    Bf16Kind::dpbf16,
    avx512_bf16::pack_vnni,
    avx512_bf16::product_dpbf16,
    avx512_bf16::grad_weight_dpbf16,
    avx512_bf16::grad_weight_rounded_dpbf16,
    avx512_bf16::round_to_bfloat16,
    avx512_bf16::column_sums_bfloat16};

} // namespace relu_mlp::cpu

#include "end_target.h"
#endif
