// The kernels for AVX-512 with AMX for bfloat16: Intel servers since 2023
// (Sapphire Rapids).
#include "isa.h"
#ifdef RELU_MLP_X86

#define RELU_MLP_ISA amx
#define RELU_MLP_TARGET                                                       \
  "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16,amx-tile,amx-" \
  "bf16"
#define RELU_MLP_VECTOR_BYTES 64
#define RELU_MLP_VECTOR_REGISTERS 32
#include "begin_target.h"
#include "../kernels/bf16_amx.h"

namespace relu_mlp::cpu {

// Added to avx512_set (isa.cpp).
extern const Bf16Kernels amx_kernels = {
    Bf16Kind::amx,
    amx::pack_vnni,
    amx::product_amx,
    amx::grad_weight_amx,
    amx::grad_weight_rounded_amx,
    amx::round_to_bfloat16,
    amx::column_sums_bfloat16};

} // namespace relu_mlp::cpu

#include "end_target.h"
#endif
