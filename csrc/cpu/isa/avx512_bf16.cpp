// AVX-512 with dot products for bfloat16: AMD since 2022 (Zen 4), and Intel servers.
#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <utility>

#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target( \
        "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16")
#endif

#define RELU_MLP_ISA avx512_bf16
#define RELU_MLP_VECTOR_BYTES 64
#define RELU_MLP_VECTOR_REGISTERS 32
#include "../kernels/x86.h"
#include "../kernels/bf16_dot.h"

namespace relu_mlp::cpu {

// What it does better than avx512_set; isa.cpp puts them together.
extern const PairKernels avx512_bf16_kernels = {
    Pairs::dots,
    avx512_bf16::pack_tiles,
    avx512_bf16::product_of_dots,
    avx512_bf16::grad_weight_of_dots<float>,
    avx512_bf16::grad_weight_of_dots<uint16_t>,
    avx512_bf16::narrow_bfloat16,
    avx512_bf16::column_sums_bfloat16};

} // namespace relu_mlp::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
