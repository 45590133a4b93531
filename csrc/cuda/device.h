// The descriptions of a pass and of a device that plans depend on. Plain C++,
// in every build.
#pragma once

#include <cstdint>
#include <vector>

namespace relu_mlp::cuda {

// A cudaStream_t. This type needs no header of the CUDA runtime.
using Stream = void*;

// The properties that plans depend on. An A100 has 108, 166912 and 167936, an
// H200 132, 232448 and 233472.
struct DeviceProperties {
  int multiprocessors;
  int shared_per_block; // bytes, with the opt-in to more than 48 KB
  int shared_per_multiprocessor; // bytes
};

// A pass over tensors of one dtype.
struct PassSpec {
  int64_t rows;
  std::vector<int64_t> widths; // of x, the hidden layers and y
  int element_size; // bytes
  bool is_backward;
  bool recomputes; // whether a backward pass computes hidden activations or y
  DeviceProperties device;
};

} // namespace relu_mlp::cuda
