// How a call on a GPU is served: functions of the call and of the device's
// properties alone, in every build, so that they are tested without a GPU.
#pragma once

#include "device.h"
#include "fused/fused_plan.h"

namespace relu_mlp::cuda {

enum class Method {
  fused, // one kernel for the whole pass
  layered, // a product for each layer, and kernels between the products
};

struct Plan {
  Method method;
  FusedPlan fused; // for Method::fused
};

// The plan of a pass, by the first method in the list of candidates that serves
// the call. The passes obey it.
Plan plan_call(const Call& call);

// -- The products of a layered pass ------------------------------------------

// The shape of one product, y (rows, out) = a (rows, in) w (out, in)^T, or of
// one of the two that its gradients take: they have the same three sizes and
// the same leading dimensions. A leading dimension is the distance of two rows.
struct ProductShape {
  int64_t rows, in, out;
  int64_t input_ld, output_ld; // of (rows, in) and of (rows, out)
  int element_size; // bytes
  bool aligned; // whether every matrix starts at an address divisible by 16
};

// Whether cuBLASLt computes it, with what follows fused into its epilogue. Else
// PyTorch does.
//
// cuBLASLt serves 16-bit formats. float32 is left to PyTorch, which knows
// whether its user allows TF32 (no C interface says so), and float64 has no
// epilogues. Rows must begin at addresses divisible by 16: its fast kernels
// need that, and epilogues on ragged shapes, above all on an output of width 1,
// are known to have failed elsewhere.
bool is_for_cublaslt(const ProductShape& product);

// The lowest delta that a backward pass computes, (rows, cols), is used only in
// products that can be split along its columns, unless something below its
// layer is needed. So it is computed this many columns at a time and never
// exists whole. Fewer columns take less memory, but the tiles of a product
// should keep the device busy. A pass that recomputes also computes the
// activations of these columns, so there memory comes first.
int64_t columns_at_once(
    int64_t rows,
    int64_t cols,
    bool recompute,
    const Device&);

// How the columns of a matrix are summed: a block has a tile of 32 * vector
// columns and a chunk of the rows; a second kernel adds the chunks' sums in
// their order. The chunks are few enough for that kernel to be short, and the
// blocks enough to fill the device.
struct ColumnReduction {
  int vector; // elements that a thread loads at once
  int64_t tiles, chunks, chunk_rows;
  int64_t blocks() const {
    return tiles * chunks;
  }
};

constexpr int reduction_lanes = 32, reduction_rows = 8; // of a block's threads

// `vector` is 16 / element size where 16-byte loads are possible, else 1.
ColumnReduction plan_reduction(
    int64_t rows,
    int64_t cols,
    int vector,
    const Device&);

// Elements that a thread may load at once from rows of `cols` elements, `ld`
// apart. `aligned` says whether the first is at an address divisible by 16.
int vector_length(int64_t cols, int64_t ld, int element_size, bool aligned);

} // namespace relu_mlp::cuda
