// The part of CUDA that this package's kernels use. All kernels and launches go
// through this header, which has two forms. Under nvcc it is a thin wrapper of
// CUDA. With RELU_MLP_CUDA_ON_HOST it is the emulator in tests/cuda_on_host,
// which runs the same kernels on the host. Plain C++ that includes this header
// gets its host functions, but neither launch() nor the device functions.
//
// A kernel is written
//
//     template <...>
//     RELU_MLP_KERNEL void RELU_MLP_BOUNDS(threads)
//         name(RELU_MLP_PARAMETER P p)
//
// and launched by launch(name<...>, {grid, threads, shared_bytes}, stream, p).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../arithmetic.h"
#include "device.h"

namespace relu_mlp::cuda {

// The number of blocks, the threads of a block, and its bytes of dynamic shared
// memory.
struct LaunchConfig {
  int64_t grid;
  int block;
  int64_t shared_bytes = 0;
};

// The 16 bytes that one thread loads or stores at once, at an address divisible
// by 16.
struct alignas(16) Vector16Bytes {
  uint32_t word[4];
};

constexpr int warp_size = 32;

} // namespace relu_mlp::cuda

#ifdef RELU_MLP_CUDA_ON_HOST
#include "emulator.h"
#else

#include <cuda_runtime.h>

#include <array>
#include <mutex>
#include <stdexcept>
#include <string>

// The symbol is weak because the library also loads with a PyTorch without
// CUDA, which lacks it.
extern "C" __attribute__((weak)) int32_t
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace relu_mlp::cuda {

// Throws an error that becomes a RuntimeError in Python.
inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(
        std::string("relu_mlp: ") + what + ": " + cudaGetErrorString(status));
  }
}

inline int current_device() {
  int device;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// PyTorch's current stream of the current device.
inline Stream current_stream() {
  void* stream;
  if (!aoti_torch_get_current_cuda_stream ||
      aoti_torch_get_current_cuda_stream(current_device(), &stream) != 0) {
    throw std::runtime_error(
        "relu_mlp: this PyTorch has no current CUDA stream");
  }
  return stream;
}

// The properties of the current device, queried once per device.
inline DeviceProperties device_properties() {
  constexpr int max_devices = 64;
  static std::array<std::once_flag, max_devices> asked;
  static std::array<DeviceProperties, max_devices> known;
  const int device = current_device();
  const auto ask = [&](DeviceProperties& properties) {
    const auto get = [&](cudaDeviceAttr attribute) {
      int value;
      check(
          cudaDeviceGetAttribute(&value, attribute, device),
          "cudaDeviceGetAttribute");
      return value;
    };
    properties = {
        get(cudaDevAttrMultiProcessorCount),
        get(cudaDevAttrMaxSharedMemoryPerBlockOptin),
        get(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  };
  if (device >= max_devices) {
    DeviceProperties properties;
    ask(properties);
    return properties;
  }
  std::call_once(asked[device], [&] { ask(known[device]); });
  return known[device];
}

} // namespace relu_mlp::cuda

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#define RELU_MLP_DEVICE __device__ __forceinline__
#define RELU_MLP_KERNEL __global__
// The maximum threads of a block, and the minimum blocks that fit on a
// multiprocessor at a time.
#define RELU_MLP_BOUNDS(...) __launch_bounds__(__VA_ARGS__)
#define RELU_MLP_PARAMETER const __grid_constant__
#define RELU_MLP_UNROLL _Pragma("unroll")
#define RELU_MLP_NO_UNROLL _Pragma("unroll 1")
#define RELU_MLP_UNROLL_TWICE _Pragma("unroll 2")

namespace relu_mlp::cuda {

template <typename P>
void launch(
    void (*kernel)(P),
    const LaunchConfig& shape,
    Stream stream,
    const P& parameters) {
  constexpr int64_t without_opt_in = 48 << 10;
  if (shape.shared_bytes > without_opt_in) {
    check(
        cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
            static_cast<int>(shape.shared_bytes)),
        "cudaFuncSetAttribute");
  }
  kernel<<<
      static_cast<unsigned>(shape.grid), shape.block, shape.shared_bytes,
      static_cast<cudaStream_t>(stream)>>>(parameters);
  check(cudaGetLastError(), "launch");
}

RELU_MLP_DEVICE int thread_index() {
  return threadIdx.x;
}
RELU_MLP_DEVICE int block_size() {
  return blockDim.x;
}
RELU_MLP_DEVICE int block_index() {
  return blockIdx.x;
}
RELU_MLP_DEVICE int grid_size() {
  return gridDim.x;
}
RELU_MLP_DEVICE int lane_index() {
  return threadIdx.x % warp_size;
}
RELU_MLP_DEVICE int warp_index() {
  return threadIdx.x / warp_size;
}

// A barrier for all threads of the block.
RELU_MLP_DEVICE void sync() {
  __syncthreads();
}
// The value of lane (lane_index() ^ mask). All threads of the warp call this
// together.
template <typename V>
RELU_MLP_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// The block's dynamic shared memory, aligned to 16 bytes.
RELU_MLP_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char relu_mlp_shared[];
  return relu_mlp_shared;
}

RELU_MLP_DEVICE Vector16Bytes load_16_bytes(const void* address) {
  const uint4 v = *static_cast<const uint4*>(address);
  return {{v.x, v.y, v.z, v.w}};
}
RELU_MLP_DEVICE void store_16_bytes(void* address, const Vector16Bytes& v) {
  *static_cast<uint4*>(address) =
      make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

// Four 8x8 matrices of 16-bit elements from shared memory, transposed. Lane
// 8 m + i gives the address of row i of matrix m: 8 elements, 16 bytes. In
// word m, lane 4 g + t receives the elements (2 t, g) and (2 t + 1, g).
RELU_MLP_DEVICE void load_transposed(uint32_t (&words)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
      : "r"(address)
      : "memory");
}

// c += a b: a is 16 x 16, b 16 x 8, c 16 x 8, with the sums in float32.
// Lane 4 g + t holds, two elements to a word with the lower column or row
// first,
//   a[0], a[1], a[2], a[3]: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)
//   b[0], b[1]: (2t, g), (2t + 8, g)
//   c[0..3]: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// a and b are bfloat16 if IsBFloat16, else float16.
template <bool IsBFloat16>
RELU_MLP_DEVICE void mma(
    float (&c)[4],
    const uint32_t (&a)[4],
    uint32_t b0,
    uint32_t b1) {
  if constexpr (IsBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Two floats rounded to 16 bits, `low` in the lower half.
template <bool IsBFloat16>
RELU_MLP_DEVICE uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (IsBFloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, 4);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, 4);
  }
  return word;
}
template <bool IsBFloat16>
RELU_MLP_DEVICE float unpack_low(uint32_t word) {
  if constexpr (IsBFloat16) {
    return __uint_as_float(word << 16);
  } else {
    return __half2float(__ushort_as_half(word & 0xffff));
  }
}
template <bool IsBFloat16>
RELU_MLP_DEVICE float unpack_high(uint32_t word) {
  if constexpr (IsBFloat16) {
    return __uint_as_float(word & 0xffff0000u);
  } else {
    return __half2float(__ushort_as_half(word >> 16));
  }
}

// max(z, 0) of each half; NaN stays NaN.
template <bool IsBFloat16>
RELU_MLP_DEVICE uint32_t relu(uint32_t z) {
  if constexpr (IsBFloat16) {
    __nv_bfloat162 pair;
    memcpy(&pair, &z, 4);
    pair = __hmax2_nan(pair, __floats2bfloat162_rn(0.0f, 0.0f));
    memcpy(&z, &pair, 4);
  } else {
    __half2 pair;
    memcpy(&pair, &z, 4);
    pair = __hmax2_nan(pair, __floats2half2_rn(0.0f, 0.0f));
    memcpy(&z, &pair, 4);
  }
  return z;
}

// Each half of `change` where that half of a is positive or NaN, else 0.
template <bool IsBFloat16>
RELU_MLP_DEVICE uint32_t select_positive(uint32_t change, uint32_t a) {
  if constexpr (IsBFloat16) {
    __nv_bfloat162 pair;
    memcpy(&pair, &a, 4);
    return change & __hgtu2_mask(pair, __floats2bfloat162_rn(0.0f, 0.0f));
  } else {
    __half2 pair;
    memcpy(&pair, &a, 4);
    return change & __hgtu2_mask(pair, __floats2half2_rn(0.0f, 0.0f));
  }
}

} // namespace relu_mlp::cuda

#endif // __CUDACC__
#endif // RELU_MLP_CUDA_ON_HOST
