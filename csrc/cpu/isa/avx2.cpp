// The kernels for AVX2 and FMA: Intel since 2013 (Haswell), AMD since 2015.
#include "isa.h"
#ifdef RELU_MLP_X86

#define RELU_MLP_ISA avx2
#define RELU_MLP_TARGET "avx2,fma,f16c"
#define RELU_MLP_VECTOR_BYTES 32
#define RELU_MLP_VECTOR_REGISTERS 16
#include "begin_target.h"
#include "../kernels/table.h"

namespace relu_mlp::cpu {

extern const InstructionSet avx2_set = {
    "avx2", avx2::kernels<float>, avx2::kernels<double>, avx2::bfloat16,
    avx2::half};

} // namespace relu_mlp::cpu

#include "end_target.h"
#endif
