// Compares csrc/cuda/layered/cublaslt_api.h with NVIDIA's header.
// tools/cuda_check.py compiles this file if it finds cublasLt.h. Nothing is
// linked.
#include <cublasLt.h>

#include <type_traits>

#include "../csrc/cuda/layered/cublaslt_api.h"

namespace ours = relu_mlp::cuda::cublaslt;

#define SAME(own, theirs) \
  static_assert(static_cast<long long>(own) == static_cast<long long>(theirs))

SAME(ours::success, CUBLAS_STATUS_SUCCESS);
SAME(ours::not_supported, CUBLAS_STATUS_NOT_SUPPORTED);
SAME(ours::float32, CUDA_R_32F);
SAME(ours::float16, CUDA_R_16F);
SAME(ours::bfloat16, CUDA_R_16BF);
SAME(ours::compute_float32, CUBLAS_COMPUTE_32F);
SAME(ours::not_transposed, CUBLAS_OP_N);
SAME(ours::transposed, CUBLAS_OP_T);
SAME(ours::transpose_a, CUBLASLT_MATMUL_DESC_TRANSA);
SAME(ours::transpose_b, CUBLASLT_MATMUL_DESC_TRANSB);
SAME(ours::epilogue, CUBLASLT_MATMUL_DESC_EPILOGUE);
SAME(ours::bias_pointer, CUBLASLT_MATMUL_DESC_BIAS_POINTER);
SAME(ours::bias_type, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE);
SAME(ours::max_workspace, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
SAME(ours::reduction_schemes, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK);
SAME(ours::alignment_a, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
SAME(ours::alignment_b, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
SAME(ours::alignment_c, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
SAME(ours::alignment_d, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
SAME(ours::reduction_in_compute_type, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
SAME(ours::LtEpilogue::none, CUBLASLT_EPILOGUE_DEFAULT);
SAME(ours::LtEpilogue::relu, CUBLASLT_EPILOGUE_RELU);
SAME(ours::LtEpilogue::bias, CUBLASLT_EPILOGUE_BIAS);
SAME(ours::LtEpilogue::relu_bias, CUBLASLT_EPILOGUE_RELU_BIAS);
SAME(ours::LtEpilogue::gradient_of_b, CUBLASLT_EPILOGUE_BGRADB);

SAME(sizeof(ours::Algorithm), sizeof(cublasLtMatmulAlgo_t));
using Theirs = cublasLtMatmulHeuristicResult_t;
using Ours = ours::HeuristicResult;
SAME(sizeof(Ours), sizeof(Theirs));
SAME(offsetof(Ours, algorithm), offsetof(Theirs, algo));
SAME(offsetof(Ours, workspace), offsetof(Theirs, workspaceSize));
SAME(offsetof(Ours, state), offsetof(Theirs, state));

// All pointers are passed alike, and so are all enumerations of four bytes. So
// it is enough that arguments agree in number and in size.
template <typename F, typename G>
struct Alike : std::false_type {};
template <typename R, typename... As, typename S, typename... Bs>
  requires(sizeof...(As) == sizeof...(Bs))
struct Alike<R(As...), S(Bs...)>
    : std::bool_constant<
          sizeof(R) == sizeof(S) &&
          ((sizeof(As) == sizeof(Bs) &&
            std::is_pointer_v<As> == std::is_pointer_v<Bs>) &&
           ...)> {};

#define CHECK(name, arguments) \
  static_assert(Alike<ours::Status arguments, decltype(cublasLt##name)>());
namespace relu_mlp::cuda::cublaslt {
RELU_MLP_CUBLASLT_FUNCTIONS(CHECK)
}
