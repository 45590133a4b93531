// How a call is served: who computes its products, in which chunks and blocks
// of rows, and what is packed when. Only make_plan() decides (plan.cpp,
// packing.cpp). The passes follow the plan.
//
// A plan depends on shapes, on the dtype and on the processor, never on the
// number of threads. Therefore results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "tuning.h"

namespace relu_mlp::cpu {

// -- The input of make_plan() -------------------------------------------------

enum class Dtype { float32, float64, bfloat16, float16 };

// What the processor and its chosen instruction set offer for a dtype.
struct Capabilities {
  Dtype dtype;
  Bf16Kind bf16; // the instructions that multiply, if dtype is bfloat16
  int64_t panel; // columns of a panel of float or double products
  int64_t vector_bytes;
  bool has_half_arithmetic; // whether the processor computes in float16

  bool is_16bit() const {
    return dtype == Dtype::bfloat16 || dtype == Dtype::float16;
  }
};

// y (rows, out) = x (rows, in) weight (out, in)^T. Strides count elements. They
// belong to the operands that the products read: 16-bit numbers are first
// converted to contiguous float.
struct LayerShape {
  int64_t in, out;
  int64_t input_row_stride, weight_row_stride;
};

struct Call {
  int64_t rows;
  std::vector<LayerShape> layers;
  Capabilities capabilities;
  const Tuning* tuning;

  int64_t parameters() const; // weights, without biases
  int64_t widest() const; // the largest width, of x and y too; at least 1
};

// -- The plan ----------------------------------------------------------------

// The class that does the products: see layers.h.
enum class LayersKind {
  packed, // PackedLayers: in float or double
  bf16, // Bf16Layers<float>: bfloat16; weight gradients are summed in float
  bf16_one_block, // Bf16Layers<BFloat16>: the same for a single block of rows
  library, // LibraryLayers: PyTorch's products
};

// How the right operand of a product gets into the layout that the kernels
// read.
enum class Pack {
  none, // not packed: dot products of rows, or a product of the library
  view, // read in place; only a ragged last panel is copied
  once, // copied before the first block of rows, for all of them
  per_use, // copied for every product; a thread copies its own columns
  left, // the left operand is packed instead: out^T = b^T a^T
};

// The three products of a layer, by their right operands.
struct LayerPacking {
  Pack forward; // a W^T: the weight, transposed
  Pack grad_input; // delta W: the weight
  Pack grad_weight; // delta^T a: the layer's input
};

struct Plan {
  const char* candidate; // the name of the rule that made this plan
  LayersKind layers;
  int64_t block; // rows that go through all layers at once
  int64_t chunk; // rows with their own sums; a chunk has one thread
  int64_t chunks;
  std::vector<LayerPacking> packing; // by layer
  const Tuning* tuning;

  // With a single chunk, threads share every product instead.
  bool shares_products() const {
    return chunks == 1;
  }
};

Plan make_plan(const Call& call);

// The packing of a plan whose other members are given.
std::vector<LayerPacking> plan_packing(const Call& call, const Plan& plan);

} // namespace relu_mlp::cpu
