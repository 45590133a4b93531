// Matrix products with fused epilogues by cuBLASLt.
#pragma once

#include <compare>

#include "../../tensor.h"
#include "cublaslt_api.h"
#include "../device.h"

namespace relu_mlp::cuda::cublaslt {

// Whether the library was found. The first call opens it.
bool is_available();

// D = op(A) op(B) in the column-major layout of BLAS. All matrices have one
// 16-bit type; sums are in float32. D is (m, n), op(A) is (m, k), op(B) is (k,
// n).
struct Problem {
  int type;
  bool transposes_a, transposes_b;
  int64_t m, n, k;
  int64_t lda, ldb, ldd;
  LtEpilogue epilogue;
  uint32_t alignment = 0; // of all operands, in bytes; `multiply` sets it

  auto operator<=>(const Problem&) const = default;
};

struct Pointers {
  const void *a, *b;
  void* d;
  const void* bias; // the epilogue reads it, or writes a bias gradient
};

// Computes the product on a stream of the current device. Returns false and
// does nothing if cuBLASLt has no algorithm for the problem. Throws if the
// library reports any other failure. `like` is a tensor on that device:
// PyTorch's allocator provides the workspace for the duration of the call.
bool multiply(
    Problem problem,
    const Pointers& operands,
    const Tensor& like,
    Stream stream);

// Whether the ReLU epilogue of this device propagates NaN like PyTorch's ReLU.
// This is not documented, so it is tried once for each device and type. Returns
// false if it has not been tried and the stream is capturing a graph.
bool relu_passes_nan(int type, const Tensor& like, Stream stream);

} // namespace relu_mlp::cuda::cublaslt
