// The kernels for the instructions that the compiler may always use: SSE2 on
// x86-64, NEON on AArch64.
#define RELU_MLP_ISA baseline
#define RELU_MLP_VECTOR_BYTES 16
#if defined(__aarch64__)
#define RELU_MLP_VECTOR_REGISTERS 32
#else
#define RELU_MLP_VECTOR_REGISTERS 16
#endif
#include "../kernels/table.h"
#include "isa.h"

namespace relu_mlp::cpu {

extern const InstructionSet baseline_set = {
    "baseline", baseline::kernels<float>, baseline::kernels<double>,
    baseline::bfloat16, baseline::half};

} // namespace relu_mlp::cpu
