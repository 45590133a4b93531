// AVX-512 with AMX for bfloat16: Intel servers since 2023 (Sapphire Rapids).
#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <utility>

#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target( \
        "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16," \
        "amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16")
#endif

#define RELU_MLP_ISA amx
#define RELU_MLP_VECTOR_BYTES 64
#define RELU_MLP_VECTOR_REGISTERS 32
#include "../kernels/x86.h"
#include "../kernels/bf16_amx.h"

namespace relu_mlp::cpu {

// What it does better than avx512_set; isa.cpp puts them together.
extern const PairKernels amx_kernels = {
    Pairs::tiles,
    amx::pack_tiles,
    amx::product_of_tiles,
    amx::grad_weight_of_tiles<float>,
    amx::grad_weight_of_tiles<uint16_t>,
    amx::narrow_bfloat16,
    amx::column_sums_bfloat16};

} // namespace relu_mlp::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
