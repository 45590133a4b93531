// Arithmetic shared by the CPU, CUDA kernels and kernel launches.
#pragma once

#include <cstdint>
#include <type_traits>

// Marks functions that both GPU kernels and plain C++ call.
#ifdef __CUDACC__
#define RELU_MLP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RELU_MLP_HOST_DEVICE inline
#endif

namespace relu_mlp {

// The type in which elements of type T are computed.
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
