// The interface of a class that does the products of a network's layers for the
// passes (walk.h). Three classes implement it: PackedLayers (packed_layers.h),
// Bf16Layers (bf16_layers.h) and LibraryLayers (library_layers.h). The plan
// says which one serves a call (plan.h).
#pragma once

#include <concepts>

#include "../network.h"
#include "plan.h"

namespace relu_mlp::cpu {

// Which products a pass needs: the products of its forward pass, and the
// products that propagate delta.
struct PassNeeds {
  bool computes_forward;
  const Needs* gradients; // null if the pass computes no gradients

  // Whether layer l is computed.
  bool forward(std::size_t) const {
    return computes_forward;
  }
  // Whether delta is propagated to the input of layer l.
  bool grad_input(std::size_t l) const {
    return gradients && l >= gradients->lowest_layer() &&
        gradients->propagation_through(l);
  }
};

// L does the products of a network whose parameters have type T. An object
// serves one call. Its constructor packs the operands that the plan packs once.
// It takes PassNeeds, or another class with these two member functions. It does
// not read a layer for which both are false.
//
//   L::Element   the type of a block's activations a and deltas
//   L::Sum       the type that weight gradients are summed in
//   L::takes_any_strides   whether delta may have any strides; else its rows
//                          are contiguous
//
// For layer l with `in` and `out` features, on a block of `rows` rows:
//
//   forward(l, z, a, relu)
//       z (rows, out) = a (rows, in) W_l^T + b_l, then ReLU if `relu`
//   grad_weight(l, sum, delta, a, add, scratch)
//       sum (out, in) = delta (rows, out)^T a, or sum += delta^T a if `add`
//   grad_input(l, out, delta, mask)
//       out (rows, in) = delta W_l where mask > 0 or is NaN, else 0; without a
//       mask, out = delta W_l
//   grad_bias(sums, delta)
//       sums[j] += the sum of column j of delta
//   scratch_size(rows, widest)
//       how many elements of scratch grad_weight needs for a block of `rows`
//       rows of a network whose largest width is `widest`
//
// z, out and sum are contiguous, or have contiguous rows. `forward` and
// `grad_input` are called for the layers that PassNeeds named.
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
