// The kernels for AVX-512: Intel servers since 2017 (Skylake), AMD since 2022 (Zen 4).
#if defined(__x86_64__) && defined(__GNUC__)

// All that is not to be compiled for this instruction set comes before the
// pragma.
#include <immintrin.h>

#include <utility>

#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define RELU_MLP_ISA avx512
#define RELU_MLP_VECTOR_BYTES 64
#define RELU_MLP_VECTOR_REGISTERS 32
#include "../kernels/x86.h"
#include "../kernels/table.h"

namespace relu_mlp::cpu {

extern const InstructionSet avx512_set = {
    "avx512", avx512::kernels<float>, avx512::kernels<double>,
    avx512::bfloat16, avx512::half};

} // namespace relu_mlp::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
