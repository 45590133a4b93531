// The vector-Jacobian product of a backward pass (relu_mlp/second_order.py), of
// one thread over blocks of rows. The object owns the memory of one block.
//
// A block's deltas go down through the layers, as in the backward pass. Then
// the tangents x', a_1', ... a_{L-1}' and z_L' go up:
//
//   z_l' = a_{l-1}' W_l^T + a_{l-1} W_l'^T + b_l', masked by a_l if l < L
//
// Both are in memory at the same time for one block only. The products with W_l
// and with W_l' are those of two objects of the same class L. For the types see
// block_forward.h. Deltas and tangents are not rounded to T.
#pragma once

#include <vector>

#include "block_forward.h"
#include "elementwise.h"
#include "sharing.h"

namespace relu_mlp::cpu {

// What a vector-Jacobian product computes. Whatever else is wanted is 0.
// Layers are counted from 0; the tangent of layer l is that of its input, and
// the tangent of layer L is z_L'.
template <typename T>
class VjpNeeds {
 public:
  VjpNeeds(const Network<T>& network, const VjpPass<T>& pass)
      : pass_(pass), layers_(network.layers.size()), lowest_delta_(layers_) {
    const std::vector<Layer<T>>& changes = pass.tangents.layers;
    if (!pass.tangents.x.data) {
      do {
        ++lowest_tangent_;
      } while (lowest_tangent_ <= layers_ &&
               !changes[lowest_tangent_ - 1].weight.data &&
               !changes[lowest_tangent_ - 1].bias);
    }
    for (std::size_t l = layers_; l-- > 0;) {
      if (of_weight(l) || of_input(l)) {
        lowest_delta_ = l;
      }
      if (of_weight(l)) {
        highest_tangent_ = std::max(highest_tangent_, l);
      }
    }
    const bool is_curved = has_curvature(network.output_activation);
    of_y_ = pass.of_y && is_curved && has_tangent(layers_);
    if (of_grad_output() || of_y_) {
      highest_tangent_ = layers_;
    }
  }

  bool has_tangent(std::size_t l) const {
    return l >= lowest_tangent_;
  }
  bool of_weight(std::size_t l) const { // delta_l^T a_{l-1}'
    return pass_.of_weights[l] && has_tangent(l);
  }
  bool of_input(std::size_t l) const { // delta_l W_l'
    return pass_.of_inputs[l] && pass_.tangents.layers[l].weight.data;
  }
  bool of_grad_output() const {
    return pass_.of_grad_output && has_tangent(layers_);
  }
  bool of_y() const {
    return of_y_;
  }

  // Whether the tangent of layer l + 1 is computed from that of layer l.
  bool propagates_tangent(std::size_t l) const {
    return l < highest_tangent_ && has_tangent(l + 1);
  }
  // The lowest layer whose delta is computed, or the number of layers.
  std::size_t lowest_delta() const {
    return lowest_delta_;
  }

  // Which products with W_l are needed, as PassNeeds says it.
  struct OfWeights {
    const VjpNeeds& needs;

    bool forward(std::size_t l) const {
      return needs.has_tangent(l) && needs.propagates_tangent(l);
    }
    bool grad_input(std::size_t l) const {
      return l > needs.lowest_delta();
    }
  };
  // Which products with W_l' are needed.
  struct OfTangents {
    const VjpNeeds& needs;

    bool forward(std::size_t l) const {
      return needs.pass_.tangents.layers[l].weight.data &&
          needs.propagates_tangent(l);
    }
    bool grad_input(std::size_t l) const {
      return needs.of_input(l);
    }
  };

 private:
  const VjpPass<T>& pass_;
  const std::size_t layers_;
  std::size_t lowest_tangent_ = 0, highest_tangent_ = 0, lowest_delta_;
  bool of_y_;
};

template <typename T, Layers<T> L>
class BlockVjp {
  using C = typename L::Element;
  using Sum = typename L::Sum;
  static constexpr bool rounds = BlockForward<T, L>::rounds;

 public:
  BlockVjp(
      const Network<T>& network,
      const L& layers,
      const L& tangent_layers,
      const Plan& plan,
      const VjpPass<T>& pass,
      const VjpNeeds<T>& needs)
      : network_(network),
        layers_(layers),
        tangent_layers_(tangent_layers),
        pass_(pass),
        needs_(needs),
        sharing_(plan),
        block_(plan.block),
        size_(block_ * network.widest(0)),
        spare_(size_),
        widened_(rounds ? size_ : 0) {}

  // Computes the results of the rows [begin, end). Writes the gradients of
  // weights to of_weights[l] (out, in).
  void run(int64_t begin, int64_t end, const std::vector<Sum*>& of_weights) {
    const std::size_t layers = network_.layers.size();
    const std::size_t lowest = needs_.lowest_delta();
    std::vector<Buffer<C>> delta_memory;
    std::vector<Matrix<const C>> deltas(layers);
    delta_memory.reserve(layers - lowest);
    for (std::size_t l = lowest; l < layers; ++l) {
      delta_memory.emplace_back(block_ * network_.width(l + 1));
    }
    const Buffer<C> tangent_memory[2] = {Buffer<C>(size_), Buffer<C>(size_)};
    const Buffer<C> scratch(layers_.scratch_size(block_, network_.widest(0)));

    int64_t row = begin;
    do { // also once for an empty batch, whose sums are 0
      const int64_t rows = std::min(block_, end - row);
      for (std::size_t l = layers; l-- > lowest;) {
        C* const to = delta_memory[l - lowest].get();
        deltas[l] = l + 1 == layers ? output_delta(row, rows, to)
                                    : grad_input(l + 1, row, deltas[l + 1], to);
        if (needs_.of_input(l)) {
          write_of_input(l, row, deltas[l]);
        }
      }
      Matrix<const C> tangent = {};
      if (needs_.has_tangent(0)) {
        tangent = widen_to(
            tangent_memory[0].get(), rows_of(pass_.tangents.x, row, rows));
      }
      for (std::size_t l = 0; l < layers; ++l) {
        if (needs_.of_weight(l)) {
          layers_.grad_weight(
              l, contiguous(of_weights[l], deltas[l].cols, tangent.cols),
              deltas[l], tangent, row > begin, scratch.get());
        }
        if (needs_.propagates_tangent(l)) {
          C* const to = tangent_memory[(l + 1) % 2].get();
          tangent = next_tangent(l, row, rows, tangent, to);
        }
      }
      write_output(row, tangent);
      row += block_;
    } while (row < end);
  }

 private:
  static Matrix<const C> widen_to(C* memory, Matrix<const T> m) {
    return BlockForward<T, L>::widen_to(memory, m);
  }

  // The input of layer l, (rows, in). It is valid until the next call.
  Matrix<const C> layer_input(std::size_t l, int64_t row, int64_t rows) const {
    return widen_to(
        widened_.get(),
        rows_of(l == 0 ? network_.x : pass_.hidden[l - 1], row, rows));
  }
  // The same for y. It has no data if phi is the identity.
  Matrix<const C> output(int64_t row, int64_t rows) const {
    return network_.output_activation == Activation::none
        ? Matrix<const C>{}
        : widen_to(widened_.get(), rows_of(pass_.y, row, rows));
  }

  // delta_L: grad_output itself if it can be used in place, else at `to`.
  Matrix<const C> output_delta(int64_t row, int64_t rows, C* to) const {
    const Activation phi = network_.output_activation;
    const Matrix<const T> grad = rows_of(pass_.grad_output, row, rows);
    if constexpr (!rounds) {
      if (phi == Activation::none &&
          (L::takes_any_strides || grad.col_stride == 1)) {
        return grad;
      }
    }
    const Matrix<C> delta = contiguous(to, rows, grad.cols);
    activation_backward(phi, delta, grad, output(row, rows));
    return as_const(delta);
  }

  // delta_l W_l, masked by the layer's input, at `to`.
  Matrix<const C> grad_input(
      std::size_t l,
      int64_t row,
      Matrix<const C> delta,
      C* to) const {
    const Matrix<C> out = contiguous(to, delta.rows, network_.width(l));
    layers_.grad_input(l, out, delta, layer_input(l, row, delta.rows));
    return as_const(out);
  }

  // The gradient of the input of layer l: delta_l W_l'.
  void write_of_input(std::size_t l, int64_t row, Matrix<const C> delta) const {
    const int64_t width = network_.width(l);
    T* const result = pass_.of_inputs[l] + row * width;
    if constexpr (rounds) {
      const Matrix<C> out = contiguous(spare_.get(), delta.rows, width);
      tangent_layers_.grad_input(l, out, delta, {});
      round_to(result, out.data, out.rows * out.cols);
    } else {
      tangent_layers_.grad_input(
          l, contiguous(result, delta.rows, width), delta, {});
    }
  }

  // z_l' of layer l from the tangent of its input, masked unless the layer is
  // the last one, at `to`.
  Matrix<const C> next_tangent(
      std::size_t l,
      int64_t row,
      int64_t rows,
      Matrix<const C> tangent,
      C* to) const {
    const auto& [weight_tangent, bias_tangent] = pass_.tangents.layers[l];
    const Matrix<C> z = contiguous(to, rows, network_.width(l + 1));
    if (weight_tangent.data) { // this adds the tangent of the bias
      tangent_layers_.forward(l, z, layer_input(l, row, rows), false);
    } else if (bias_tangent) {
      fill_rows(z, bias_tangent);
    }
    if (needs_.has_tangent(l) && !weight_tangent.data && !bias_tangent) {
      layers_.forward(l, z, tangent, false);
    } else if (needs_.has_tangent(l)) {
      const Matrix<C> product = contiguous(spare_.get(), rows, z.cols);
      layers_.forward(l, product, tangent, false);
      for_each_part(z, [&](int64_t first, int64_t count) {
        add(rows_of(z, first, count), rows_of(as_const(product), first, count));
      });
    }
    if (l + 1 < network_.layers.size()) {
      const Matrix<const C> a = layer_input(l + 1, row, rows);
      for_each_part(z, [&](int64_t first, int64_t count) {
        mask(rows_of(z, first, count), rows_of(a, first, count));
      });
    }
    return as_const(z);
  }

  // The gradients of grad_output and y, from z_L'.
  void write_output(int64_t row, Matrix<const C> tangent) const {
    if (!needs_.of_grad_output() && !needs_.of_y()) {
      return;
    }
    const Activation phi = network_.output_activation;
    const Matrix<const T> grad = rows_of(pass_.grad_output, row, tangent.rows);
    const Matrix<const C> y = output(row, tangent.rows);
    for_each_part(tangent, [&](int64_t first, int64_t count) {
      const auto part = [&](auto m) { return rows_of(m, first, count); };
      const auto result = [&](T* to) {
        return part(contiguous(to + row * grad.cols, grad.rows, grad.cols));
      };
      if (needs_.of_grad_output()) {
        activation_backward(
            phi, result(pass_.of_grad_output), part(tangent), part(y));
      }
      if (needs_.of_y()) {
        activation_curvature(
            phi, result(pass_.of_y), part(grad), part(tangent), part(y));
      }
    });
  }

  // Calls f(first, count) for parts of the rows of m.
  template <typename U, typename F>
  void for_each_part(Matrix<U> m, const F& f) const {
    sharing_.for_each_range(
        m.rows, sharing_.work_to_pack(m.rows, m.cols),
        [&](int64_t begin, int64_t end) { f(begin, end - begin); });
  }

  const Network<T>& network_;
  const L &layers_, &tangent_layers_; // of W_l, and of W_l' and b_l'
  const VjpPass<T>& pass_;
  const VjpNeeds<T>& needs_;
  const Sharing sharing_;
  const int64_t block_; // rows of a block
  const int64_t size_; // elements of a block in the widest layer
  const Buffer<C> spare_; // a result before it is rounded or added
  const Buffer<C> widened_; // a saved activation of a block
};

} // namespace relu_mlp::cpu
