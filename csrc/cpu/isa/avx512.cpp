// The kernels for AVX-512: Intel servers since 2017 (Skylake), AMD since 2022
// (Zen 4).
#include "isa.h"
#ifdef RELU_MLP_X86

#define RELU_MLP_ISA avx512
#define RELU_MLP_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define RELU_MLP_VECTOR_BYTES 64
#define RELU_MLP_VECTOR_REGISTERS 32
#include "begin_target.h"
#include "../kernels/table.h"

namespace relu_mlp::cpu {

extern const InstructionSet avx512_set = {
    "avx512", avx512::kernels<float>, avx512::kernels<double>, avx512::bfloat16,
    avx512::half};

} // namespace relu_mlp::cpu

#include "end_target.h"
#endif
