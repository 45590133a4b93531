// What lies where in a block's shared memory and in the workspace, and the
// index arithmetic of the fused kernels. Plain functions, the same on host and
// device.
#pragma once

#include "../../arithmetic.h"
#include "../tuning.h"

namespace relu_mlp::cuda {

using tuning::max_layers;

// ---------------------------------------------------------------------------
// 16-bit elements: products on tensor cores, widths in groups of 32 columns.

constexpr int group_width = 32;
constexpr int chunk_width = 8; // elements of a 16-byte access

RELU_MLP_HOST_DEVICE int groups_of(int width) {
  return (width + group_width - 1) / group_width;
}

// mma gives lane 4 g + t the columns 2 t and 2 t + 1 of each tile of 8. Which
// column of the matrix a tile's column stands for is ours to choose, as long as
// the weights are read accordingly. This choice gives a lane 8 neighbouring
// columns, a chunk, in the 4 tiles of a group: in global and shared memory it
// reads and writes 16 bytes at once. Returns the column of the matrix for
// column n of the given tile.
RELU_MLP_HOST_DEVICE int logical_column(int tile, int n) {
  return group_width * (tile / 4) + chunk_width * (n / 2) + 2 * (tile % 4) +
      n % 2;
}

// The byte offset of a chunk in a matrix of `groups` groups in shared memory.
// Chunks change places within a row so that no two lanes of a phase meet in a
// bank: neither 4 neighbouring chunks of two rows 2 i and 2 i + 1, as products
// read weights and as tiles are written, nor the same chunk of rows
// 8 i ... 8 i + 7, as load_transposed reads them. Rows of an odd number of
// groups start at alternating halves of the banks' 128 bytes by themselves.
// The places are the same ones 8 rows on, row_offset further.
RELU_MLP_HOST_DEVICE int row_offset(int row, int groups) {
  return row * groups * group_width * 2;
}
RELU_MLP_HOST_DEVICE int chunk_offset(int row, int chunk, int groups) {
  const int place = (row >> 1 & 3) | (groups % 2 == 0 ? (row & 1) << 2 : 0);
  return row_offset(row, groups) + (chunk ^ place) * 16;
}

// The sums of one layer's weight and bias gradients, float32, as mma leaves
// them: 128 floats for each tile of 16 rows (out) and 8 columns (in), 4 to a
// lane. After the tiles of the columns follows one whose columns are all equal
// to the bias gradient.
constexpr int tile_floats = 128;

RELU_MLP_HOST_DEVICE int sum_tiles_across(int in) {
  return 4 * groups_of(in) + 1;
}
RELU_MLP_HOST_DEVICE int sum_tiles_down(int out) {
  return 2 * groups_of(out);
}

// Where an element of the sums belongs. column is -1 for the bias, and row -1
// for what belongs nowhere.
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

// Floats from one row to the next in shared memory: an odd number of 16-byte
// parts, so that 8 lanes that read the same part of 8 rows meet in no bank.
RELU_MLP_HOST_DEVICE int fma_stride(int width) {
  return 4 * ((width + 3) / 4 | 1);
}

// The sums: (out rounded up to 4, in rounded up to 4), then the bias's.
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

// The floats that the sums of one layer's gradients take.
RELU_MLP_HOST_DEVICE int sum_floats_of(int out, int in, int element_size) {
  return element_size == 2
      ? sum_tiles_down(out) * sum_tiles_across(in) * tile_floats
      : round_up(out, 4) * (round_up(in, 4) + 1);
}

// Byte offsets in a block's shared memory, and their end.
struct FusedLayout {
  int weights[max_layers]; // as they lie
  int transposed[max_layers]; // weights, transposed; 16-bit backward only
  int biases[max_layers]; // float32
  int inputs[max_layers]; // a tile's rows of each layer's input
  int deltas[2];
  int sums[max_layers]; // of the layer's gradients
  int bytes;
};

} // namespace relu_mlp::cuda
