// Matrix products with fused epilogues by cuBLASLt.
#pragma once

#include <compare>

#include "../../tensor.h"
#include "cublaslt_api.h"
#include "../device.h"

namespace relu_mlp::cuda::cublaslt {

// Whether the library was found. The first call opens it.
bool is_available();

// D = op(A) op(B), column by column as BLAS has it, all of one 16-bit type,
// with sums in float32: D is (m, n), op(A) is (m, k), op(B) is (k, n).
struct Problem {
  int type;
  bool transposes_a, transposes_b;
  int64_t m, n, k;
  int64_t lda, ldb, ldd;
  Epilogue epilogue;
  uint32_t alignment = 0; // of all operands, in bytes; `multiply` enters it

  auto operator<=>(const Problem&) const = default;
};

struct Buffers {
  const void *a, *b;
  void* d;
  const void* bias; // what the epilogue reads or, for a gradient, writes
};

// Computes it on a stream of the current device. Returns false and does nothing
// where cuBLASLt has no algorithm for the problem. Throws what the library
// reports of other failures. `like` is a tensor on that device: PyTorch's
// allocator provides the workspace for the duration of the call.
bool multiply(
    Problem problem,
    const Buffers& operands,
    const Tensor& like,
    Stream stream);

// Whether this device's ReLU epilogue passes NaN on, as PyTorch's ReLU does.
// This is not documented, so it is tried once on each device and type. Returns
// false while it has not been tried and the stream records a graph.
bool relu_passes_nan(int type, const Tensor& like, Stream stream);

} // namespace relu_mlp::cuda::cublaslt
