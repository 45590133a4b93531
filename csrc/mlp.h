// What an operator is asked to do, as plain data. Nothing here knows PyTorch.
#pragma once

#include <cstdint>
#include <string_view>

namespace relu_mlp {

enum class Activation { none, relu, sigmoid, tanh };
enum class Loss { sse, half_sse, mse };

// A matrix in memory that somebody else owns. Element (i, j) is
// data[i * row_stride + j * col_stride]; strides count elements and may be 0,
// as they are in the gradient that y.sum() sends back.
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

// Which gradients are wanted, as one character '0' or '1' for x, for every
// weight and for every bias, in that order.
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
  // The lowest layer, counted from 0, that has a gradient to compute; the
  // number of layers if there is none. Nothing is propagated below it.
  std::size_t lowest_layer() const {
    std::size_t l = 0;
    while (!x() && l < layers() && !weight(l) && !bias(l)) {
      ++l;
    }
    return l;
  }
  // Whether delta is carried on to the input of layer l.
  bool propagation_through(std::size_t l) const {
    return x() || l > lowest_layer();
  }
};

} // namespace relu_mlp
