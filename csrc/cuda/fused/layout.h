// The layout of a block's shared memory and of the workspace, and the index
// arithmetic of the fused kernels. The functions are the same on host and
// device.
#pragma once

#include "../../arithmetic.h"
#include "../tuning.h"

namespace relu_mlp::cuda {

using tuning::max_layers;

// ---------------------------------------------------------------------------
// 16-bit elements: products on tensor cores, widths in groups of 32 columns.

constexpr int group_width = 32;
constexpr int vector_width = 8; // elements of a 16-byte access

RELU_MLP_HOST_DEVICE int groups_of(int width) {
  return (width + group_width - 1) / group_width;
}

// mma gives lane 4 g + t the columns 2 t and 2 t + 1 of each tile of 8. We may
// choose which matrix column a tile column stands for, if the weights are read
// accordingly. This choice gives a lane 8 neighboring columns, one vector, in
// the 4 tiles of a group. The lane then reads and writes 16 bytes at once in
// global and shared memory. Returns the matrix column of column n of the given
// tile.
RELU_MLP_HOST_DEVICE int logical_column(int tile, int n) {
  return group_width * (tile / 4) + vector_width * (n / 2) + 2 * (tile % 4) +
      n % 2;
}

// The byte offset of a vector in a matrix of `groups` groups in shared memory.
// Vectors are swizzled within a row to avoid bank conflicts in two patterns: 4
// neighboring vectors of rows 2 i and 2 i + 1, in which products read weights
// and tiles are written, and the same vector of rows 8 i ... 8 i + 7, which
// load_transposed reads. Rows of an odd number of groups start at alternating
// halves of the banks' 128 bytes even without the swizzle. The swizzle repeats
// after 8 rows, row_offset further.
RELU_MLP_HOST_DEVICE int row_offset(int row, int groups) {
  return row * groups * group_width * 2;
}
RELU_MLP_HOST_DEVICE int vector_offset(int row, int vector, int groups) {
  const int place = (row >> 1 & 3) | (groups % 2 == 0 ? (row & 1) << 2 : 0);
  return row_offset(row, groups) + (vector ^ place) * 16;
}

// The float32 sums of one layer's weight and bias gradients, in the layout of
// mma's accumulators: 128 floats for each tile of 16 rows (out) and 8 columns
// (in), 4 per lane. After the tiles of the columns comes one more tile. All of
// its columns equal the bias gradient.
constexpr int tile_floats = 128;

RELU_MLP_HOST_DEVICE int sum_tiles_across(int in) {
  return 4 * groups_of(in) + 1;
}
RELU_MLP_HOST_DEVICE int sum_tiles_down(int out) {
  return 2 * groups_of(out);
}

// The gradient element that a sum belongs to. column is -1 for the bias. row is
// -1 for padding.
struct SumPlace {
  int row, column;
};

RELU_MLP_HOST_DEVICE SumPlace mma_sum_place(int index, int out, int in) {
  const int tile = index / tile_floats, lane = index % tile_floats / 4;
  const int element = index % 4, across = sum_tiles_across(in);
  const int row = 16 * (tile / across) + lane / 4 + 8 * (element / 2);
  const int column = 8 * (tile % across) + 2 * (lane % 4) + element % 2;
  if (row >= out) {
    return {-1, 0};
  }
  if (tile % across == across - 1) {
    return {column % 8 == 0 ? row : -1, -1};
  }
  return {column < in ? row : -1, column};
}

// ---------------------------------------------------------------------------
// float32: products on FMAs, widths in multiples of 4.

// The distance between two rows in shared memory, in floats. It is an odd
// number of 16-byte vectors, so 8 lanes that read the same vector of 8 rows
// have no bank conflict.
RELU_MLP_HOST_DEVICE int fma_stride(int width) {
  return 4 * ((width + 3) / 4 | 1);
}

// The sums: (out rounded up to 4, in rounded up to 4), then the sums of the
// bias.
RELU_MLP_HOST_DEVICE SumPlace fma_sum_place(int index, int out, int in) {
  const int across = round_up(in, 4), down = round_up(out, 4);
  const int row = index / across, column = index % across;
  if (row >= down) {
    const int bias = index - down * across;
    return {bias < out ? bias : -1, -1};
  }
  return {row < out && column < in ? row : -1, column};
}

// ---------------------------------------------------------------------------
// Both.

// The number of floats in the sums of one layer's gradients.
RELU_MLP_HOST_DEVICE int sum_floats_of(int out, int in, int element_size) {
  return element_size == 2
      ? sum_tiles_down(out) * sum_tiles_across(in) * tile_floats
      : round_up(out, 4) * (round_up(in, 4) + 1);
}

// Byte offsets in a block's shared memory, and their end.
struct FusedLayout {
  int weights[max_layers]; // not transposed
  int transposed[max_layers]; // weights, transposed; 16-bit backward only
  int biases[max_layers]; // float32
  int inputs[max_layers]; // a tile's rows of each layer's input
  int deltas[2];
  int sums[max_layers]; // of each layer's gradients
  int bytes;
};

} // namespace relu_mlp::cuda
