// How a pass on a GPU is served. These functions depend only on the pass and on
// the device's properties. They are in every build, so testing them needs no
// GPU.
#pragma once

#include "device.h"
#include "fused/fused_plan.h"

namespace relu_mlp::cuda {

enum class Method {
  fused, // one kernel for the whole pass
  layered, // a product for each layer, and kernels between the products
};

struct PassPlan {
  Method method;
  FusedPlan fused; // for Method::fused
};

// Returns the plan of the first candidate that serves the pass. The passes
// follow the plan.
PassPlan plan_pass(const PassSpec& pass);

// -- The products of a layered pass ------------------------------------------

// The shape of one product: y (rows, out) = a (rows, in) w (out, in)^T, or one
// of the two products of its gradients. All three have the same sizes and the
// same leading dimensions. A leading dimension is the distance from one row to
// the next.
struct ProductShape {
  int64_t rows, in, out;
  int64_t input_ld, output_ld; // of (rows, in) and of (rows, out)
  int element_size; // bytes
  bool aligned; // whether every matrix starts at an address divisible by 16
};

// Whether cuBLASLt computes the product and fuses the operation that follows
// into its epilogue. Otherwise PyTorch computes the product.
//
// cuBLASLt serves 16-bit formats. PyTorch computes float32, because only
// PyTorch knows whether the user allows TF32 (no C interface tells). float64
// has no epilogues. Rows must begin at addresses divisible by 16. The fast
// kernels need that, and epilogues are known to have failed in other projects
// on ragged shapes, above all on an output of width 1.
bool is_for_cublaslt(const ProductShape& product);

// How many columns of the lowest delta (rows, cols) a backward pass computes at
// a time. If nothing below its layer is needed, that delta is used only in
// products that can be split along its columns, so it never exists whole. Fewer
// columns take less memory, but the tiles of a product should keep the device
// busy. A pass that recomputes also holds the activations of these columns, so
// it puts memory first.
int64_t columns_at_once(
    int64_t rows,
    int64_t cols,
    bool recompute,
    const DeviceProperties&);

// How the columns of a matrix are summed. A block sums a tile of 32 * vector
// columns over a chunk of the rows. A second kernel adds the sums of the chunks
// in order. There are few enough chunks to keep that kernel short, and enough
// blocks to fill the device.
struct ColumnReduction {
  int vector; // elements that a thread loads at once
  int64_t tiles, chunks, chunk_rows;
  int64_t blocks() const {
    return tiles * chunks;
  }
};

constexpr int reduction_lanes = 32, reduction_rows = 8; // of a block's threads

// `vector` is 16 / element size if 16-byte loads are possible, else 1.
ColumnReduction plan_reduction(
    int64_t rows,
    int64_t cols,
    int vector,
    const DeviceProperties&);

// The number of elements that a thread may load at once from rows of `cols`
// elements that are `ld` apart. `aligned` says whether the first row starts at
// an address divisible by 16.
int vector_length(int64_t cols, int64_t ld, int element_size, bool aligned);

} // namespace relu_mlp::cuda
