// The layers of a network with this package's products in float and double
// (products.h). Parameters in bfloat16 and float16 are converted once for every
// call.
//
// Tensors have type T, products compute in compute_t<T>. For each layer the
// plan says how each of its three products gets its right operand (Pack in
// plan.h).
#pragma once

#include <vector>

#include "convert.h"
#include "layers.h"
#include "products.h"

namespace relu_mlp::cpu {

template <typename T>
class PackedLayers {
 public:
  using Element = compute_t<T>;
  using Sum = compute_t<T>;
  static constexpr bool takes_any_strides = true;

  template <typename ProductNeeds>
  PackedLayers(
      const Network<T>& network,
      const Plan& plan,
      const ProductNeeds& needs)
      : products_(chosen_kernels<T>(), plan),
        packing_(plan.packing),
        layers_(network.layers.size()) {
    constexpr std::size_t most_of_layer = 4;
    memory_.reserve(most_of_layer * layers_.size());
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      if (needs.forward(l) || needs.grad_input(l)) {
        prepare(l, network.layers[l], needs);
      }
    }
  }
  ~PackedLayers() {
    while (!memory_.empty()) { // the last one first, which suits Scratch
      memory_.pop_back();
    }
  }

  void forward(
      std::size_t l,
      Matrix<Element> z,
      Matrix<const Element> a,
      bool relu) const {
    const auto& [weight, transposed, plain, bias] = layers_[l];
    const EpilogueArgs<Element> args{
        relu ? Epilogue::bias_relu : Epilogue::bias, bias};
    switch (packing_[l].forward) {
      case Pack::once:
        return products_.multiply(z, a, transposed, args);
      case Pack::none:
        return products_.linear_unpacked(z, a, weight, bias, relu);
      case Pack::left:
        return products_.linear_packing_rows(z, a, weight, bias, relu);
      case Pack::per_use:
      case Pack::view: // not planned: rows of W^T are not contiguous
        return products_.pack_and_multiply(z, a, weight.transposed(), args);
    }
  }

  int64_t scratch_size(int64_t rows, int64_t) const {
    return products_.edge_panel_size(rows);
  }

  void grad_weight(
      std::size_t l,
      Matrix<Sum> sum,
      Matrix<const Element> delta,
      Matrix<const Element> a,
      bool add,
      Element* scratch) const {
    const EpilogueArgs<Element> args{Epilogue::store, nullptr, {}, add};
    if (packing_[l].grad_weight == Pack::view) {
      products_.multiply(
          sum, delta.transposed(), products_.view_as_panels(a, scratch), args);
    } else {
      products_.pack_and_multiply(sum, delta.transposed(), a, args);
    }
  }

  void grad_input(
      std::size_t l,
      Matrix<Element> out,
      Matrix<const Element> delta,
      Matrix<const Element> mask) const {
    const EpilogueArgs<Element> args{
        mask.data ? Epilogue::mask : Epilogue::store, nullptr, mask};
    if (packing_[l].grad_input == Pack::per_use) {
      products_.pack_and_multiply(out, delta, layers_[l].weight, args);
    } else {
      products_.multiply(out, delta, layers_[l].plain, args);
    }
  }

  void grad_bias(double* sums, Matrix<const Element> delta) const {
    products_.column_sums(sums, delta);
  }

 private:
  struct PreparedLayer {
    Matrix<const Element> weight; // (out, in)
    Panels<Element> transposed; // weight^T (in, out), for a W^T
    Panels<Element> plain; // weight (out, in), for delta W
    const Element* bias = nullptr; // (out)
  };

  Element* memory(int64_t count) {
    return memory_.emplace_back(count).get();
  }

  template <typename ProductNeeds>
  void prepare(
      std::size_t l,
      const Layer<T>& given,
      const ProductNeeds& needs) {
    PreparedLayer& layer = layers_[l];
    const int64_t out = given.weight.rows, in = given.weight.cols;
    layer.weight = widened(given.weight, memory(widened_size<T>(out * in)));
    if (needs.forward(l) && given.bias) {
      layer.bias =
          widened(contiguous(given.bias, 1, out), memory(widened_size<T>(out)))
              .data;
    }
    if (needs.forward(l) && packing_[l].forward == Pack::once) {
      layer.transposed = products_.pack(
          layer.weight.transposed(), memory(products_.packed_size(in, out)));
    }
    if (!needs.grad_input(l)) {
      return;
    }
    if (packing_[l].grad_input == Pack::view) {
      layer.plain = products_.view_as_panels(
          layer.weight, memory(products_.edge_panel_size(out)));
    } else if (packing_[l].grad_input == Pack::once) {
      layer.plain =
          products_.pack(layer.weight, memory(products_.packed_size(out, in)));
    }
  }

  const Products<Element> products_;
  const std::vector<LayerPacking>& packing_;
  std::vector<PreparedLayer> layers_;
  std::vector<Buffer<Element>> memory_;
};

} // namespace relu_mlp::cpu
