// How a call on a GPU is served. Functions of the problem and the device's
// properties alone, in every build, so that they can be tested without a GPU.
#pragma once

#include <cstdint>
#include <vector>

#include "device.h"
#include "fused/fused_plan.h"

namespace relu_mlp::cuda {

// narrow: one kernel for a whole pass. wide: layer by layer, by cuBLASLt where
// its rules (below) allow it. library: layer by layer, by PyTorch's products.
enum class Regime { narrow, wide, library };

// A pass, of contiguous and aligned tensors.
struct Question {
  int64_t rows;
  std::vector<int64_t> widths; // of x, the hidden layers and y
  int element_size; // bytes
  bool is_backward;
  bool recompute; // the hidden activations, in the backward pass
  Device device;
};

Regime choose_regime(const Question& question);

// The same as the narrow regime asks it. Rows there are at least 1.
NarrowPlanQuestion as_narrow(const Question& question);

// One product of matrices in rows, y (rows, out) = a (rows, in) w (out, in)^T,
// or one of the two that its gradients take: they have the same three sizes and
// the same leading dimensions. A leading dimension is the distance of two rows.
struct Product {
  int64_t rows, in, out;
  int64_t input_ld, output_ld; // of (rows, in) and of (rows, out)
  int element_size; // bytes
  bool aligned; // whether every matrix starts at an address divisible by 16
};

// Whether cuBLASLt computes it, with what follows fused into its epilogue. The
// others are PyTorch's products.
//
// cuBLASLt serves 16-bit formats. float32 is left to PyTorch, which knows
// whether its user allows TF32 (no C interface says so), and float64 has no
// epilogues. Rows must begin at addresses divisible by 16: its fast kernels
// want that, and epilogues on ragged shapes, an output of width 1 above all,
// are known to have failed elsewhere.
bool is_for_cublaslt(const Product& product);

// The lowest delta that a backward pass computes, (rows, cols), takes part in
// nothing but products that can be cut along its columns, if nothing below its
// layer is asked for. So it is computed as many columns at a time as this says,
// and never exists whole: few for the sake of memory, but enough tiles of a
// product to occupy the device. With `recompute`, memory comes first, because the
// activation of the same columns is computed there, too.
int64_t columns_at_once(
    int64_t rows,
    int64_t cols,
    bool recompute,
    const Device&);

// How a matrix is walked down its columns, to sum them: a block has a tile of
// 32 * vector columns and a chunk of the rows; the chunks' sums are added in
// their order by a second kernel. Few enough chunks for that to be short, and
// enough blocks to fill the device.
struct Columns {
  int vector; // elements that a thread loads at once
  int64_t tiles, chunks, chunk_rows;
  int64_t blocks() const {
    return tiles * chunks;
  }
};

constexpr int columns_lanes = 32, columns_rows = 8; // of a block's 256 threads

// `vector` is 16 / element size where 16-byte loads are allowed, else 1.
Columns plan_columns(int64_t rows, int64_t cols, int vector, const Device&);

// Elements that a thread may load at once from rows of `cols` elements, `ld`
// apart. `aligned` says whether the first is at an address divisible by 16.
int vector_length(int64_t cols, int64_t ld, int element_size, bool aligned);

} // namespace relu_mlp::cuda
