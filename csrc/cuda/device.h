// What plans and passes know of a call and of a device. Plain C++, in every
// build.
#pragma once

#include <cstdint>
#include <vector>

namespace relu_mlp::cuda {

// A cudaStream_t, which can be passed on without the header of the CUDA
// runtime.
using Stream = void*;

// The properties that plans depend on. The numbers of an A100 are 108,
// 166912 and 167936, those of an H200 132, 232448 and 233472.
struct Device {
  int multiprocessors;
  int shared_per_block; // bytes, with the opt-in to more than 48 KB
  int shared_per_multiprocessor; // bytes
};

// A pass over tensors of one type.
struct Call {
  int64_t rows;
  std::vector<int64_t> widths; // of x, the hidden layers and y
  int element_size; // bytes
  bool is_backward;
  bool recomputes; // whether a backward pass computes hidden activations or y
  Device device;
};

} // namespace relu_mlp::cuda
