// The kernels for AVX2 and FMA: Intel since 2013 (Haswell), AMD since 2015.
#if defined(__x86_64__) && defined(__GNUC__)

// All that is not to be compiled for this instruction set comes before the
// pragma.
#include <immintrin.h>

#include <utility>

#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define RELU_MLP_ISA avx2
#define RELU_MLP_VECTOR_BYTES 32
#define RELU_MLP_VECTOR_REGISTERS 16
#include "../kernels/x86.h"
#include "../kernels/table.h"

namespace relu_mlp::cpu {

extern const InstructionSet avx2_set = {
    "avx2", avx2::kernels<float>, avx2::kernels<double>,
    avx2::bfloat16, avx2::half};

} // namespace relu_mlp::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
