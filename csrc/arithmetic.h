// Arithmetic that the CPU, CUDA's kernels and its launches share.
#pragma once

#include <cstdint>
#include <type_traits>

// For functions that kernels on a GPU and plain C++ share.
#ifdef __CUDACC__
#define RELU_MLP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RELU_MLP_HOST_DEVICE inline
#endif

namespace relu_mlp {

// The type that elements of type T are computed with.
template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// a / b, rounded up; neither is negative.
RELU_MLP_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// a, rounded up to a multiple of b.
template <typename Integer>
RELU_MLP_HOST_DEVICE constexpr Integer round_up(
    Integer a,
    std::type_identity_t<Integer> b) {
  return (a + b - 1) / b * b;
}

} // namespace relu_mlp
