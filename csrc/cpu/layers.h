// What a way of multiplying has to offer so that the passes (walk.h) can use it
// for the layers of a network. Three classes do: PackedLayers
// (packed_layers.h), Bf16Layers (bf16_layers.h) and LibraryLayers
// (library_layers.h). plan.h says which serves a call.
#pragma once

#include <concepts>

#include "../network.h"
#include "plan.h"

namespace relu_mlp::cpu {

// Which products a pass needs: those of its forward pass, and those that
// propagate delta.
struct PassNeeds {
  bool forward;
  const Needs* gradients; // null if the pass computes no gradients

  // Whether delta is propagated to the input of layer l.
  bool grad_input(std::size_t l) const {
    return gradients && l >= gradients->lowest_layer() &&
        gradients->propagation_through(l);
  }
};

// L does the products of a network whose parameters are stored as T. It is made
// once for every call, and packs what the plan says is packed once.
//
//   L::Element   the type of a block's activations a and deltas
//   L::Sum       the type that weight gradients are summed in
//   L::takes_any_strides   whether delta may have any strides, or needs contiguous rows
//
// For layer l with `in` and `out` features, on a block of `rows` rows:
//
//   forward(l, z, a, relu)            z (rows, out) = a (rows, in) W_l^T + b_l, then ReLU
//                                     if asked for
//   grad_weight(l, sum, delta, a, add, scratch)
//                                     sum (out, in) = delta (rows, out)^T a, or += that
//   grad_input(l, out, delta, mask)   out (rows, in) = delta W_l where mask > 0 or is NaN,
//                                     else 0; without a mask everywhere
//   grad_bias(sums, delta)            sums[j] += the sum of column j of delta
//   scratch_size(rows, widest)        how many elements of scratch grad_weight needs for a
//                                     block of `rows` rows of a network that wide
//
// z, out and sum are contiguous, or have contiguous rows. A forward pass calls
// `forward` alone; PassNeeds says what a pass will call.
template <typename L, typename T>
concept Layers =
    std::constructible_from<L, const Network<T>&, const Plan&, PassNeeds> &&
    requires(
        const L layers,
        std::size_t l,
        Matrix<typename L::Element> out,
        Matrix<const typename L::Element> in,
        Matrix<typename L::Sum> sum,
        double* sums,
        typename L::Element* scratch) {
      { L::takes_any_strides } -> std::convertible_to<bool>;
      { layers.forward(l, out, in, true) } -> std::same_as<void>;
      {
        layers.grad_weight(l, sum, in, in, true, scratch)
      } -> std::same_as<void>;
      { layers.grad_input(l, out, in, in) } -> std::same_as<void>;
      { layers.grad_bias(sums, in) } -> std::same_as<void>;
      { layers.scratch_size(int64_t(), int64_t()) } -> std::same_as<int64_t>;
    };

} // namespace relu_mlp::cpu
