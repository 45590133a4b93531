// What plans and passes know of a device. Plain C++, in every build.
#pragma once

#include <cstdint>

// For functions that kernels and plain C++ share.
#ifdef __CUDACC__
#define RELU_MLP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RELU_MLP_HOST_DEVICE inline
#endif

namespace relu_mlp::cuda {

// A cudaStream_t; the header of the CUDA runtime is not needed to pass one on.
using Stream = void*;

// The properties that plans depend on. The numbers of an A100 are 108,
// 166912 and 167936, those of an H200 132, 232448 and 233472.
struct Device {
  int multiprocessors;
  int shared_per_block; // bytes, with the opt-in to more than 48 KB
  int shared_per_multiprocessor; // bytes
};

} // namespace relu_mlp::cuda
