// The arguments of an operator as plain data: matrices, the needed gradients,
// and the loss. Nothing here depends on PyTorch.
#pragma once

#include <cstdint>
#include <string_view>

#include "activation.h"

namespace relu_mlp {

// A view of a matrix in memory that the view does not own. Element (i, j) is
// data[i * row_stride + j * col_stride]. Strides count elements and may be 0,
// for example in the gradient that y.sum() sends back.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;

  T& at(int64_t i, int64_t j) const {
    return data[i * row_stride + j * col_stride];
  }
  T* row(int64_t i) const {
    return data + i * row_stride;
  }
  Matrix transposed() const {
    return {data, cols, rows, col_stride, row_stride};
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

// The needed gradients, as one character '0' or '1' for x, for every weight and
// for every bias, in that order. Layers are counted from 0.
struct Needs {
  std::string_view flags;

  std::size_t layers() const {
    return (flags.size() - 1) / 2;
  }
  bool x() const {
    return flags[0] == '1';
  }
  bool weight(std::size_t l) const {
    return flags[1 + l] == '1';
  }
  bool bias(std::size_t l) const {
    return flags[1 + layers() + l] == '1';
  }

  // The lowest layer with a gradient to compute, or the number of layers if
  // there is none. Nothing is propagated below it. (reference.lowest_layer)
  std::size_t lowest_layer() const {
    std::size_t l = 0;
    while (!x() && l < layers() && !weight(l) && !bias(l)) {
      ++l;
    }
    return l;
  }
  // Whether delta is propagated to the input of layer l.
  bool propagation_through(std::size_t l) const {
    return x() || l > lowest_layer();
  }

  // The operands that the needed gradients are computed from. A forward pass
  // saves these. (reference.is_kept)
  bool reads_y(Activation output_activation) const {
    return lowest_layer() < layers() && output_activation != Activation::none;
  }
  bool reads_weight(std::size_t l) const {
    return propagation_through(l);
  }
  bool reads_input(std::size_t l) const { // x, a_1, ... a_{L-1}
    return l > lowest_layer() || weight(l);
  }
};

// The losses. Each is a scale times a sum: over the elements of e = y - target,
// or over the rows (network.h: loss_scale, cpu/losses.h).
enum class Loss {
  sse, // e^2, scale 1
  half_sse, // e^2, scale 1/2
  mse, // e^2, scale 1 / elements
  l1, // |e|, scale 1 / elements
  huber, // e^2 / 2 where |e| < 1, else |e| - 1/2; scale 1 / elements
  bce_with_logits, // binary cross entropy of sigmoid(y), scale 1 / elements
  cross_entropy, // cross entropy of softmax(y), scale 1 / rows with a class
};
inline constexpr std::string_view loss_names[] = {
    "sse",   "half_sse",        "mse",          "l1",
    "huber", "bce_with_logits", "cross_entropy"};

// A row of this class has no cross entropy.
inline constexpr int64_t ignored_class = -100;

} // namespace relu_mlp
