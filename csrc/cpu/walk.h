// Forward and backward over blocks of rows.
//
// A block of rows goes through all layers while it is in the cache. Forward, it
// leaves the hidden activations behind if they are to be kept; backward, its
// delta lies in one of two buffers, each of one block, and no gradient of a
// hidden layer ever exists whole. `Layers` does the products: OwnLayers, PairLayers,
// PairBlock or LibraryLayers.
//
// Rows are dealt out in chunks, whose number depends on the shape alone. A
// chunk has its own sums of the weight and bias gradients, which are added up
// in the order of the chunks: any number of threads gives the same bits. Where
// there is only one chunk, `Layers` may deal out the tiles of each product.
//
// Where `Layers` computes in float, bfloat16 and float16 are widened block by block;
// what the native path rounds to 16 bits, y and the hidden activations, is rounded
// here too.
#pragma once

#include <vector>

#include "../parallel.h"
#include "buffer.h"
#include "convert.h"
#include "elementwise.h"
#include "network.h"
#include "plan.h"

namespace relu_mlp::cpu {

// What the backward pass is asked for. An operand that `needs` makes
// superfluous has no data.
template <typename T>
struct BackwardPass {
  Needs needs;
  // a_1 ... a_{L-1} and y, or nothing: then they are computed again.
  std::vector<Matrix<const T>> hidden;
  Matrix<const T> y;
  bool recompute;

  // Either the gradient of y, of any strides, or, where `squares` is not null,
  // the target of the loss loss_scale * sum (y - target)^2. The sum is added to
  // *squares.
  Matrix<const T> grad_output;
  Matrix<const T> target;
  double loss_scale;
  double* squares;

  // The results, contiguous; null where not needed.
  T* grad_x;
  std::vector<T*> grad_weights, grad_biases;
};

// total[i] = the sum over the chunks of parts[chunk * step + i], in their order,
// for i < count. The first part is overwritten.
template <typename T, typename Sum>
void add_chunks(
    T* total,
    Sum* parts,
    int64_t count,
    int64_t chunks,
    int64_t step) {
  constexpr int64_t grain = 1 << 15; // elements read by a task
  parallel_for(
      count, std::max<int64_t>(1, grain / chunks),
      [&](int64_t begin, int64_t end) {
        for (int64_t c = 1; c < chunks; ++c) {
          for (int64_t i = begin; i < end; ++i) {
            parts[i] += parts[c * step + i];
          }
        }
        if constexpr (std::is_same_v<Sum, float> && sizeof(T) == 2) {
          narrow(total + begin, parts + begin, end - begin);
        } else {
          for (int64_t i = begin; i < end; ++i) {
            total[i] = T(compute_t<T>(parts[i]));
          }
        }
      });
}

// The walk of one thread over blocks of rows, and its memory. C is the type of a
// block; where T is narrower, what the native path rounds to T is rounded.
template <typename T, typename Layers>
class Blocks {
  using C = typename Layers::Element;
  using Sum = typename Layers::Sum;
  static constexpr bool is_narrow = !std::is_same_v<T, C>;

 public:
  Blocks(
      const Network<T>& network,
      const Layers& layers,
      int64_t block)
      : network_(network),
        layers_(layers),
        block_(block),
        size_(block * network.widest(1)),
        narrow_(is_narrow ? size_ : 0),
        x_(is_narrow ? block * network.width(0) : 0) {}

  // y, and the hidden activations where `hidden` names a place for them, of the
  // rows [begin, end).
  void forward(
      int64_t begin,
      int64_t end,
      const std::vector<T*>& hidden,
      T* y) {
    const std::size_t layers = network_.layers.size();
    if (is_narrow || hidden.empty()) {
      spare_[0] = Buffer<C>(size_);
      spare_[1] = Buffer<C>(size_);
    }
    for (int64_t row = begin; row < end; row += block_) {
      const int64_t rows = std::min(block_, end - row);
      Matrix<const C> a = input(row, rows);
      for (std::size_t l = 0; l < layers; ++l) {
        const int64_t width = network_.width(l + 1);
        T* to = l + 1 == layers ? y : hidden.empty() ? nullptr : hidden[l];
        to = to ? to + row * width : nullptr;
        a = linear(l, a, spare_[l % 2].get(), to);
      }
      if (network_.output_activation > Activation::relu) {
        network_.activate(
            network_.output_activation, y + row * a.cols, rows * a.cols);
      }
    }
  }

  // The gradients of the rows [begin, end). Those of the parameters are
  // written to grad_weights, and added to grad_biases.
  void backward(
      int64_t begin,
      int64_t end,
      const BackwardPass<T>& pass,
      const std::vector<Sum*>& grad_weights,
      const std::vector<double*>& grad_biases,
      double* squares) {
    const Needs& needs = pass.needs;
    const std::size_t layers = network_.layers.size();
    const std::size_t lowest = needs.lowest_layer();
    const bool widens_grad_x = is_narrow && needs.x();
    const int64_t delta_size = block_ * network_.widest(widens_grad_x ? 0 : 1);
    Buffer<C> delta_memory[2] = {
        Buffer<C>(delta_size), Buffer<C>(delta_size)};
    const Buffer<C> scratch(layers_.scratch_size(block_, network_.widest(0)));
    if (pass.recompute) {
      for (std::size_t l = 1; l <= layers; ++l) {
        computed_.emplace_back(block_ * network_.width(l));
      }
    } else if (is_narrow) {
      spare_[0] = Buffer<C>(size_);
    }

    int64_t row = begin;
    do { // once for an empty batch too, whose gradients are 0
      const int64_t rows = std::min(block_, end - row);
      if (pass.recompute) {
        recompute(
            row, rows,
            pass.squares || network_.output_activation != Activation::none);
      }
      Matrix<const C> delta =
          output_delta(row, rows, pass, delta_memory[0].get(), squares);
      for (std::size_t l = layers; l-- > lowest;) {
        const bool propagates = needs.propagation_through(l);
        Matrix<const C> a = {};
        if (needs.weight(l) || (propagates && l > 0)) {
          a = layer_input(l, row, rows, pass);
        }
        if (needs.weight(l)) {
          layers_.grad_weight(
              contiguous(grad_weights[l], delta.cols, a.cols), delta, a,
              row > begin, scratch.get());
        }
        if (needs.bias(l)) {
          layers_.column_sums(grad_biases[l], delta);
        }
        if (propagates) {
          delta = grad_input(
              l, row, delta, a, pass, delta_memory[(layers - l) % 2].get());
        }
      }
      row += block_;
    } while (row < end);
  }

 private:
  // m, in memory of its own if it has to be widened.
  Matrix<const C> widen_to(C* memory, Matrix<const T> m) {
    if constexpr (is_narrow) {
      return widened(m, memory);
    } else {
      return m;
    }
  }
  Matrix<const C> input(int64_t row, int64_t rows) {
    return widen_to(x_.get(), rows_of(network_.x, row, rows));
  }

  // a_l W_l^T + b_l, with ReLU where the layer has it, at `to` if there is such
  // a place. Returns the result in the precision that is computed with.
  Matrix<const C> linear(
      std::size_t l,
      Matrix<const C> a,
      C* spare,
      T* to) {
    const bool relu = l + 1 < network_.layers.size() ||
        network_.output_activation == Activation::relu;
    C* data = spare;
    if constexpr (!is_narrow) {
      data = to ? to : spare;
    }
    const Matrix<C> out = contiguous(data, a.rows, network_.width(l + 1));
    layers_.linear(l, out, a, relu);
    if constexpr (is_narrow) {
      T* const rounded = to ? to : narrow_.get();
      narrow(rounded, data, out.rows * out.cols);
      widen(data, rounded, out.rows * out.cols);
    }
    return as_const(out);
  }

  // Fills computed_ with a_1 ... a_{L-1} of a block, and y if it is needed.
  void recompute(int64_t row, int64_t rows, bool needs_y) {
    Matrix<const C> a = input(row, rows);
    for (std::size_t l = 0; l + !needs_y < computed_.size(); ++l) {
      a = linear(l, a, computed_[l].get(), nullptr);
    }
    if (network_.output_activation > Activation::relu) {
      C* const y = computed_.back().get();
      const int64_t count = rows * a.cols;
      if constexpr (is_narrow) {
        narrow(narrow_.get(), y, count);
        network_.activate(network_.output_activation, narrow_.get(), count);
        widen(y, narrow_.get(), count);
      } else {
        network_.activate(network_.output_activation, y, count);
      }
    }
  }

  // What layer l was applied to.
  Matrix<const C> layer_input(
      std::size_t l,
      int64_t row,
      int64_t rows,
      const BackwardPass<T>& pass) {
    if (l == 0) {
      return input(row, rows);
    }
    if (pass.recompute) {
      return contiguous<const C>(
          computed_[l - 1].get(), rows, network_.width(l));
    }
    return widen_to(
        spare_[0].get(), rows_of(pass.hidden[l - 1], row, rows));
  }

  // delta_L, at `to` unless it can be read where it lies.
  Matrix<const C> output_delta(
      int64_t row,
      int64_t rows,
      const BackwardPass<T>& pass,
      C* to,
      double* squares) {
    const Activation phi = network_.output_activation;
    const Matrix<C> delta =
        contiguous(to, rows, network_.width(network_.layers.size()));
    Matrix<const C> y = {};
    if (pass.recompute) {
      y = contiguous<const C>(computed_.back().get(), rows, delta.cols);
    } else if (phi != Activation::none) {
      y = widen_to(spare_[0].get(), rows_of(pass.y, row, rows));
    }
    if (pass.squares) {
      *squares += squared_error(
          phi, delta, y, rows_of(pass.target, row, rows), 2 * pass.loss_scale);
      return as_const(delta);
    }
    const Matrix<const T> grad = rows_of(pass.grad_output, row, rows);
    if constexpr (!is_narrow) {
      if (phi == Activation::none &&
          (Layers::takes_any_strides || grad.col_stride == 1)) {
        return grad;
      }
    }
    activation_backward(phi, delta, grad, y);
    return as_const(delta);
  }

  // delta_l W_l, masked by the layer's input a unless that is x.
  Matrix<const C> grad_input(
      std::size_t l,
      int64_t row,
      Matrix<const C> delta,
      Matrix<const C> a,
      const BackwardPass<T>& pass,
      C* spare) {
    const int64_t width = network_.width(l);
    C* data = spare;
    T* const grad_x = l == 0 ? pass.grad_x + row * width : nullptr;
    if constexpr (!is_narrow) {
      data = grad_x ? grad_x : spare;
    }
    const Matrix<C> out = contiguous(data, delta.rows, width);
    layers_.grad_input(l, out, delta, l > 0 ? a : Matrix<const C>{});
    if constexpr (is_narrow) {
      if (grad_x) {
        narrow(grad_x, data, out.rows * out.cols);
      }
    }
    return as_const(out);
  }

  const Network<T>& network_;
  const Layers& layers_;
  const int64_t block_, size_; // rows of a block, and its elements after any layer
  Buffer<T> narrow_; // for what has to be rounded to T and back
  Buffer<C> x_, spare_[2];
  std::vector<Buffer<C>> computed_;
};

template <typename Layers, typename T>
void dense_forward(
    const Network<T>& network,
    const Strategy& strategy,
    const std::vector<T*>& hidden,
    T* y) {
  const Layers layers(network, strategy, {true, nullptr});
  strategy.each_chunk(network.x.rows, [&](int64_t, int64_t begin, int64_t end) {
    Blocks<T, Layers>(network, layers, strategy.block)
        .forward(begin, end, hidden, y);
  });
}

template <typename Layers, typename T>
void dense_backward(
    const Network<T>& network,
    const Strategy& strategy,
    const BackwardPass<T>& pass) {
  using Sum = typename Layers::Sum;
  constexpr bool sums_in_place = std::is_same_v<T, Sum>;
  const std::size_t count = network.layers.size();
  const Layers layers(network, strategy, {pass.recompute, &pass.needs});

  // Where chunk c sums up: the weight gradients one after the other, then the
  // biases'. A single chunk sums up in the results, if their type is fit.
  const bool in_place = strategy.chunks == 1 && sums_in_place;
  std::vector<int64_t> weight_at(count + 1), bias_at(count + 1);
  for (std::size_t l = 0; l < count; ++l) {
    const int64_t out = network.width(l + 1), in = network.width(l);
    weight_at[l + 1] =
        weight_at[l] + (pass.needs.weight(l) && !in_place ? out * in : 0);
    bias_at[l + 1] = bias_at[l] + (pass.needs.bias(l) ? out : 0);
  }
  const int64_t weight_count = weight_at[count], bias_count = bias_at[count];
  const Buffer<Sum> weight_sums(strategy.chunks * weight_count);
  std::vector<double> bias_sums(strategy.chunks * bias_count);
  std::vector<double> squares(strategy.chunks);
  strategy.each_chunk(network.x.rows, [&](int64_t c, int64_t begin, int64_t end) {
    Sum* const of_weights = weight_sums.get() + c * weight_count;
    double* const of_biases = bias_sums.data() + c * bias_count;
    std::vector<Sum*> grad_weights(count);
    std::vector<double*> grad_biases(count);
    for (std::size_t l = 0; l < count; ++l) {
      grad_weights[l] = of_weights + weight_at[l];
      if constexpr (sums_in_place) {
        grad_weights[l] = in_place ? pass.grad_weights[l] : grad_weights[l];
      }
      grad_biases[l] = of_biases + bias_at[l];
    }
    Blocks<T, Layers>(network, layers, strategy.block)
        .backward(begin, end, pass, grad_weights, grad_biases, &squares[c]);
  });

  if (pass.squares) {
    for (const double sum : squares) {
      *pass.squares += sum;
    }
  }
  for (std::size_t l = 0; l < count; ++l) {
    if (pass.needs.weight(l) && !in_place) {
      add_chunks(
          pass.grad_weights[l], weight_sums.get() + weight_at[l],
          weight_at[l + 1] - weight_at[l], strategy.chunks, weight_count);
    }
    if (pass.needs.bias(l)) {
      add_chunks(
          pass.grad_biases[l], bias_sums.data() + bias_at[l],
          bias_at[l + 1] - bias_at[l], strategy.chunks, bias_count);
    }
  }
}

} // namespace relu_mlp::cpu
