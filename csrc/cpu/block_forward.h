// The forward pass of one thread over blocks of rows. The object owns the
// memory of one block.
//
// T is the type of the tensors, C the type of a block in memory. If C is float
// and T has 16 bits, blocks are widened to float. The values that the native
// path rounds to T are then rounded here too: y and the hidden activations.
#pragma once

#include <vector>

#include "buffer.h"
#include "convert.h"
#include "layers.h"

namespace relu_mlp::cpu {

// Whether the last product applies the output activation itself (Epilogue).
inline bool is_in_epilogue(Activation phi) {
  return applied_by(phi) == AppliedBy::epilogue;
}

template <typename T, Layers<T> L>
class BlockForward {
 public:
  using C = typename L::Element;
  static constexpr bool rounds = !std::is_same_v<T, C>;

  BlockForward(const Network<T>& network, const L& layers, int64_t block)
      : network_(network),
        layers_(layers),
        block_(block),
        size_(block * network.widest(1)),
        rounded_(rounds ? size_ : 0),
        x_(rounds ? block * network.width(0) : 0) {}

  // Computes the rows [begin, end) of y (rows, out), and of the hidden
  // activations that have a pointer in `hidden`. All pointers point to row 0.
  void run(int64_t begin, int64_t end, const std::vector<T*>& hidden, T* y) {
    const std::size_t layers = network_.layers.size();
    Buffer<C> spare[2];
    if (rounds || hidden.empty()) {
      spare[0] = Buffer<C>(size_);
      spare[1] = Buffer<C>(size_);
    }
    for (int64_t row = begin; row < end; row += block_) {
      const int64_t rows = std::min(block_, end - row);
      Matrix<const C> a = input(row, rows);
      for (std::size_t l = 0; l < layers; ++l) {
        const int64_t width = network_.width(l + 1);
        T* to = l + 1 == layers ? y : hidden.empty() ? nullptr : hidden[l];
        to = to ? to + row * width : nullptr;
        a = apply(l, a, spare[l % 2].get(), to);
      }
      if (!is_in_epilogue(network_.output_activation)) {
        network_.activate(
            network_.output_activation, y + row * a.cols, rows * a.cols);
      }
    }
  }

  // Computes a_1 ... a_{L-1} of `rows` rows, starting at `row`: a_l at
  // computed[l - 1]. Computes y at computed.back() if it is needed.
  void recompute(
      int64_t row,
      int64_t rows,
      bool needs_y,
      const std::vector<Buffer<C>>& computed) {
    Matrix<const C> a = input(row, rows);
    for (std::size_t l = 0; l + !needs_y < computed.size(); ++l) {
      a = apply(l, a, computed[l].get(), nullptr);
    }
    if (!is_in_epilogue(network_.output_activation)) {
      activate(computed.back().get(), rows * a.cols);
    }
  }

  // x of these rows, (rows, in).
  Matrix<const C> input(int64_t row, int64_t rows) {
    return widen_to(x_.get(), rows_of(network_.x, row, rows));
  }

  // m itself, or a copy at `memory` if m must be widened.
  static Matrix<const C> widen_to(C* memory, Matrix<const T> m) {
    if constexpr (rounds) {
      return widened(m, memory);
    } else {
      return m;
    }
  }

 private:
  // Computes a W_l^T + b_l, with ReLU if the layer has one. The result goes to
  // `to` unless that is null. Returns the result in type C.
  Matrix<const C> apply(std::size_t l, Matrix<const C> a, C* spare, T* to) {
    const bool relu = l + 1 < network_.layers.size() ||
        network_.output_activation == Activation::relu;
    C* data = spare;
    if constexpr (!rounds) {
      data = to ? to : spare;
    }
    const Matrix<C> z = contiguous(data, a.rows, network_.width(l + 1));
    layers_.forward(l, z, a, relu);
    if constexpr (rounds) {
      T* const rounded = to ? to : rounded_.get();
      round_to(rounded, data, z.rows * z.cols);
      widen(data, rounded, z.rows * z.cols);
    }
    return as_const(z);
  }

  // y = phi(y), rounded to T if that has 16 bits.
  void activate(C* y, int64_t count) {
    if constexpr (rounds) {
      round_to(rounded_.get(), y, count);
      network_.activate(network_.output_activation, rounded_.get(), count);
      widen(y, rounded_.get(), count);
    } else {
      network_.activate(network_.output_activation, y, count);
    }
  }

  const Network<T>& network_;
  const L& layers_;
  const int64_t block_; // rows of a block
  const int64_t size_; // elements of a block after the widest layer
  Buffer<T> rounded_; // values that are rounded to T and widened again
  Buffer<C> x_;
};

} // namespace relu_mlp::cpu
