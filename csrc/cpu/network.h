// A network as plain data: what the passes walk over, and the views of a matrix.
#pragma once

#include <algorithm>
#include <vector>

#include "../mlp.h"

namespace relu_mlp::cpu {

template <typename T>
struct Layer {
  Matrix<const T> weight; // (out_features, in_features), rows contiguous
  const T* bias; // (out_features), contiguous; null for none
};

// Replaces z by phi(z), for an activation that needs a library.
template <typename T>
using Activate = void (*)(Activation, T* z, int64_t count);

template <typename T>
struct Network {
  Matrix<const T> x; // (rows, in_features), rows contiguous
  std::vector<Layer<T>> layers;
  Activation output_activation;
  Activate<T> activate;

  int64_t width(std::size_t l) const { // of the input of layer l, or of y
    return l < layers.size() ? layers[l].weight.cols
                             : layers.back().weight.rows;
  }
  // The largest width from width(first) on.
  int64_t widest(std::size_t first) const {
    int64_t widest = 0;
    for (std::size_t l = first; l <= layers.size(); ++l) {
      widest = std::max(widest, width(l));
    }
    return widest;
  }
};

// A contiguous matrix.
template <typename T>
Matrix<T> contiguous(T* data, int64_t rows, int64_t cols) {
  return {data, rows, cols, cols, 1};
}

// Rows [first, first + rows) of m.
template <typename T>
Matrix<T> rows_of(Matrix<T> m, int64_t first, int64_t rows) {
  return {m.row(first), rows, m.cols, m.row_stride, m.col_stride};
}

// Columns [first, first + cols) of m.
template <typename T>
Matrix<T> columns_of(Matrix<T> m, int64_t first, int64_t cols) {
  return {
      m.data + first * m.col_stride, m.rows, cols, m.row_stride, m.col_stride};
}

template <typename T>
Matrix<const T> as_const(Matrix<T> m) {
  return {m.data, m.rows, m.cols, m.row_stride, m.col_stride};
}

} // namespace relu_mlp::cpu
