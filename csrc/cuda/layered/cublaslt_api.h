// The part of cuBLASLt's C interface that this package uses. The library is
// opened at its first use, so a build needs neither its header nor its import
// library. Where cublasLt.h is found, tools/cuda_check.py compiles
// tools/cublaslt_api.cpp, which compares these declarations with NVIDIA's.
#pragma once

#include <cstddef>
#include <cstdint>

namespace relu_mlp::cuda::cublaslt {

using Status = int;
constexpr Status success = 0, not_supported = 15;

// Element types (cudaDataType_t), and float32 sums (cublasComputeType_t).
constexpr int float32 = 0, float16 = 2, bfloat16 = 14;
constexpr int compute_float32 = 68;

constexpr int32_t not_transposed = 0, transposed = 1; // cublasOperation_t

// cublasLtMatmulDescAttributes_t
constexpr int transpose_a = 3, transpose_b = 4, epilogue = 7, bias_pointer = 8,
              bias_type = 26;
// cublasLtMatmulPreferenceAttributes_t
constexpr int max_workspace = 1, reduction_schemes = 3, alignment_a = 5,
              alignment_b = 6, alignment_c = 7, alignment_d = 8;
// cublasLtReductionScheme_t; NONE is always allowed
constexpr uint32_t reduction_in_compute_type = 2;

// cublasLtEpilogue_t. A bias has one element for each row of the result.
// gradient_of_b sums the second operand over k, so it has one element for each
// column.
enum class LtEpilogue : int32_t {
  none = 1,
  relu = 2,
  bias = 4,
  relu_bias = 6,
  gradient_of_b = 512
};

using Handle = void*;
using MatmulDesc = void*;
using MatrixLayout = void*;
using Preference = void*;

struct Algorithm {
  uint64_t data[8];
};

struct HeuristicResult {
  Algorithm algorithm;
  std::size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};

// X(name, arguments) for every function; all but the last return a Status.
#define RELU_MLP_CUBLASLT_FUNCTIONS(X)                                         \
  X(Create, (Handle*))                                                         \
  X(MatmulDescCreate, (MatmulDesc*, int compute_type, int scale_type))         \
  X(MatmulDescDestroy, (MatmulDesc))                                           \
  X(MatmulDescSetAttribute, (MatmulDesc, int, const void*, std::size_t))       \
  X(MatrixLayoutCreate,                                                        \
    (MatrixLayout*, int type, uint64_t rows, uint64_t cols, int64_t ld))       \
  X(MatrixLayoutDestroy, (MatrixLayout))                                       \
  X(MatmulPreferenceCreate, (Preference*))                                     \
  X(MatmulPreferenceDestroy, (Preference))                                     \
  X(MatmulPreferenceSetAttribute, (Preference, int, const void*, std::size_t)) \
  X(MatmulAlgoGetHeuristic,                                                    \
    (Handle, MatmulDesc, MatrixLayout a, MatrixLayout b, MatrixLayout c,       \
     MatrixLayout d, Preference, int wanted, HeuristicResult*, int* found))    \
  X(Matmul,                                                                    \
    (Handle, MatmulDesc, const void* alpha, const void* a, MatrixLayout,       \
     const void* b, MatrixLayout, const void* beta, const void* c,             \
     MatrixLayout, void* d, MatrixLayout, const Algorithm*, void* workspace,   \
     std::size_t workspace_bytes, void* stream))

} // namespace relu_mlp::cuda::cublaslt
