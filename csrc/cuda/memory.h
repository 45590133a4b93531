// The CUDA runtime functions that passes call, except launches.
#pragma once

#include "machine.h"

namespace relu_mlp::cuda {

#ifdef RELU_MLP_CUDA_ON_HOST

inline int current_device() {
  return 0;
}
inline void set_device(int) {}
inline void set_bytes(void* memory, int value, std::size_t bytes, Stream) {
  std::memset(memory, value, bytes);
}
inline void copy_to_host(
    void* to,
    const void* from,
    std::size_t bytes,
    Stream) {
  std::memcpy(to, from, bytes);
}
inline bool is_capturing(Stream) {
  return false;
}

#else

// Sets the device of the CUDA runtime that is linked into this library. PyTorch
// has its own copy of the runtime.
inline void set_device(int device) {
  check(cudaSetDevice(device), "cudaSetDevice");
}

// Fills device memory with one byte value, in stream order.
inline void set_bytes(
    void* memory,
    int value,
    std::size_t bytes,
    Stream stream) {
  check(
      cudaMemsetAsync(memory, value, bytes, static_cast<cudaStream_t>(stream)),
      "cudaMemsetAsync");
}

// Copies device memory to the host in stream order, and waits for the copy.
inline void copy_to_host(
    void* to,
    const void* from,
    std::size_t bytes,
    Stream stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  check(
      cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, on),
      "cudaMemcpyAsync");
  check(cudaStreamSynchronize(on), "cudaStreamSynchronize");
}

// Whether the stream is capturing a CUDA graph. While it is, nothing may wait
// for the stream.
inline bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status;
  check(
      cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status),
      "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

#endif

} // namespace relu_mlp::cuda
