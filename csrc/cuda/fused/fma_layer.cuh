// One layer of float32 on plain FMAs: rows and weights in shared memory, and
// their product.
#pragma once

#include "parameters.cuh"

namespace relu_mlp::cuda {

// A matrix in shared memory.
struct Tile {
  float* data;
  int columns, stride;

  RELU_MLP_DEVICE float& at(int row, int column) const {
    return data[row * stride + column];
  }
  RELU_MLP_DEVICE Float4 four(int row, int column) const {
    return *reinterpret_cast<const Float4*>(&at(row, column));
  }
};

RELU_MLP_DEVICE Tile tile(unsigned char* shared, int offset, int columns) {
  return {
      reinterpret_cast<float*>(shared + offset), columns, fma_stride(columns)};
}

// Loads `count` rows, starting at `row`, with all threads of the block. Rows
// beyond the last are zeros, and so are the columns that pad the width to a
// multiple of 4.
RELU_MLP_DEVICE void load_tile(
    const Matrix<const float>& m,
    int64_t row,
    int count,
    const Tile& to) {
  const int columns = round_up(to.columns, 4);
  for (int n = thread_index(); n < count * columns; n += block_size()) {
    const int i = n / columns, j = n % columns;
    to.at(i, j) =
        row + i < m.rows && j < to.columns ? element(m, row + i, j) : 0.0f;
  }
}

// Loads the weights, with their rows padded to a multiple of 4, and the bias.
RELU_MLP_DEVICE void stage_layer(
    const FusedNetwork<float>& network,
    int l,
    unsigned char* shared,
    const FusedLayout& layout,
    bool with_bias) {
  const int in = network.widths[l], out = network.widths[l + 1];
  load_tile(
      {network.weights[l], out, in, in, 1}, 0, round_up(out, 4),
      tile(shared, layout.weights[l], in));
  float* const bias = reinterpret_cast<float*>(shared + layout.biases[l]);
  for (int n = thread_index(); with_bias && n < round_up(out, 4);
       n += block_size()) {
    bias[n] = network.biases[l] && n < out ? network.biases[l][n] : 0.0f;
  }
}

// Calls f(row, column, z) for this thread's elements of z = a W^T + b. z is 0
// in the columns that pad the width to a multiple of 4.
template <typename F>
RELU_MLP_DEVICE void for_each_pre_activation(
    const Tile& a,
    int rows,
    const Tile& weight,
    int out,
    const float* bias,
    const F& f) {
  const int ty = thread_index() / 16, tx = thread_index() % 16;
  RELU_MLP_NO_UNROLL
  for (int n = tx; n < round_up(out, 4); n += 64) {
    float c[4][4] = {};
    RELU_MLP_NO_UNROLL
    for (int k = 0; k < a.columns; k += 4) {
      Float4 left[4], right[4];
      RELU_MLP_UNROLL
      for (int i = 0; i < 4; ++i) {
        // Beyond the end, read the last row again. The result is not used.
        const int row = ty + 16 * i, column = n + 16 * i;
        left[i] = a.four(row < rows ? row : rows - 1, k);
        right[i] = weight.four(column < out ? column : out - 1, k);
      }
      RELU_MLP_UNROLL
      for (int e = 0; e < 16; ++e) {
        RELU_MLP_UNROLL
        for (int u = 0; u < 4; ++u) {
          c[e / 4][e % 4] =
              fmaf(left[e / 4].v[u], right[e % 4].v[u], c[e / 4][e % 4]);
        }
      }
    }
    RELU_MLP_UNROLL
    for (int e = 0; e < 16; ++e) {
      const int row = ty + 16 * (e / 4), column = n + 16 * (e % 4);
      if (row < rows && column < round_up(out, 4)) {
        f(row, column, column < out ? c[e / 4][e % 4] + bias[column] : 0.0f);
      }
    }
  }
}

} // namespace relu_mlp::cuda
