// The backward pass of one thread over blocks of rows. The object owns the
// memory of one block.
//
// The delta of a block is in one of two buffers, so the gradient of a hidden
// layer never exists whole. For the types see block_forward.h.
#pragma once

#include <vector>

#include "block_forward.h"
#include "elementwise.h"
#include "losses.h"

namespace relu_mlp::cpu {

template <typename T, Layers<T> L>
class BlockBackward {
  using C = typename L::Element;
  using Sum = typename L::Sum;
  static constexpr bool rounds = BlockForward<T, L>::rounds;

 public:
  BlockBackward(
      const Network<T>& network,
      const L& layers,
      const Plan& plan,
      const BackwardPass<T>& pass)
      : network_(network),
        layers_(layers),
        pass_(pass),
        block_(plan.block),
        elements_per_task_(plan.tuning->elements_per_task),
        forward_(network, layers, plan.block) {}

  // Computes the gradients of the rows [begin, end). Writes those of weights to
  // grad_weights[l] (out, in), adds those of biases to grad_biases[l] (out),
  // and adds the sum of a loss, without its scale, to *loss.
  void run(
      int64_t begin,
      int64_t end,
      const std::vector<Sum*>& grad_weights,
      const std::vector<double*>& grad_biases,
      double* loss) {
    const Needs& needs = pass_.needs;
    const std::size_t layers = network_.layers.size();
    const std::size_t lowest = needs.lowest_layer();
    // The gradients of every other layer's output go to the same memory.
    int64_t delta_width[2] = {};
    for (std::size_t l = rounds && needs.x() ? 0 : 1; l <= layers; ++l) {
      int64_t& width = delta_width[(layers - l) % 2];
      width = std::max(width, network_.width(l));
    }
    Buffer<C> delta_memory[2] = {
        Buffer<C>(block_ * delta_width[0]), Buffer<C>(block_ * delta_width[1])};
    const Buffer<C> scratch(layers_.scratch_size(block_, network_.widest(0)));
    if (pass_.recompute) {
      for (std::size_t l = 1; l <= layers; ++l) {
        computed_.emplace_back(block_ * network_.width(l));
      }
    } else if (rounds) {
      widened_ = Buffer<C>(block_ * network_.widest(1));
    }

    int64_t row = begin;
    do { // also once for an empty batch, whose gradients are 0
      const int64_t rows = std::min(block_, end - row);
      if (pass_.recompute) {
        forward_.recompute(
            row, rows,
            pass_.loss || network_.output_activation != Activation::none,
            computed_);
      }
      Matrix<const C> delta =
          output_delta(row, rows, delta_memory[0].get(), loss);
      for (std::size_t l = layers; l-- > lowest;) {
        const bool propagates = needs.propagation_through(l);
        Matrix<const C> a = {};
        if (needs.weight(l) || (propagates && l > 0)) {
          a = layer_input(l, row, rows);
        }
        if (needs.weight(l)) {
          layers_.grad_weight(
              l, contiguous(grad_weights[l], delta.cols, a.cols), delta, a,
              row > begin, scratch.get());
        }
        if (needs.bias(l)) {
          layers_.grad_bias(grad_biases[l], delta);
        }
        if (propagates) {
          delta = grad_input(
              l, row, delta, a, delta_memory[(layers - l) % 2].get());
        }
      }
      row += block_;
    } while (row < end);
  }

 private:
  // The input of layer l, (rows, in).
  Matrix<const C> layer_input(std::size_t l, int64_t row, int64_t rows) {
    if (l == 0) {
      return forward_.input(row, rows);
    }
    if (pass_.recompute) {
      return contiguous<const C>(
          computed_[l - 1].get(), rows, network_.width(l));
    }
    return forward_.widen_to(
        widened_.get(), rows_of(pass_.hidden[l - 1], row, rows));
  }

  // delta_L (rows, out): grad_output itself if it can be used in place, else at
  // `to`.
  Matrix<const C> output_delta(int64_t row, int64_t rows, C* to, double* loss) {
    const Activation phi = network_.output_activation;
    const Matrix<C> delta =
        contiguous(to, rows, network_.width(network_.layers.size()));
    Matrix<const C> y = {};
    if (pass_.recompute) {
      y = contiguous<const C>(computed_.back().get(), rows, delta.cols);
    } else if (phi != Activation::none) {
      y = forward_.widen_to(widened_.get(), rows_of(pass_.y, row, rows));
    }
    if (pass_.loss) {
      *loss += loss_and_delta(
          pass_.kind_of_loss, phi, delta, y, rows_of(pass_.target, row, rows),
          pass_.loss_scale, elements_per_task_);
      return as_const(delta);
    }
    const Matrix<const T> grad = rows_of(pass_.grad_output, row, rows);
    if constexpr (!rounds) {
      if (phi == Activation::none &&
          (L::takes_any_strides || grad.col_stride == 1)) {
        return grad;
      }
    }
    activation_backward(phi, delta, grad, y);
    return as_const(delta);
  }

  // delta_l W_l, with what else reaches the layer's input a added, masked by a
  // unless that is x.
  Matrix<const C> grad_input(
      std::size_t l,
      int64_t row,
      Matrix<const C> delta,
      Matrix<const C> a,
      C* spare) {
    const int64_t width = network_.width(l);
    C* data = spare;
    T* const grad_x = l == 0 ? pass_.grad_x + row * width : nullptr;
    if constexpr (!rounds) {
      data = grad_x ? grad_x : spare;
    }
    const Matrix<C> out = contiguous(data, delta.rows, width);
    if (l > 0 && !pass_.grad_hidden.empty() && pass_.grad_hidden[l - 1].data) {
      layers_.grad_input(l, out, delta, {});
      add(out, rows_of(pass_.grad_hidden[l - 1], row, out.rows));
      mask(out, a);
    } else {
      layers_.grad_input(l, out, delta, l > 0 ? a : Matrix<const C>{});
    }
    if constexpr (rounds) {
      if (grad_x) {
        round_to(grad_x, data, out.rows * out.cols);
      }
    }
    return as_const(out);
  }

  const Network<T>& network_;
  const L& layers_;
  const BackwardPass<T>& pass_;
  const int64_t block_; // rows of a block
  const int64_t elements_per_task_;
  BlockForward<T, L> forward_;
  Buffer<C> widened_; // a saved activation of a block
  std::vector<Buffer<C>> computed_; // a_1 ... a_{L-1} and y of a block
};

} // namespace relu_mlp::cpu
