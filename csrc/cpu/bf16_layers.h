// A network's layers in bfloat16 by products of pairs, with weights that are packed once
// for many blocks of rows. Activations and deltas stay in bfloat16, as on the native
// path; weight gradients are summed in float. A product is never dealt out to threads,
// only chunks of rows are. Where there is one chunk, pair_block.h serves it.
#pragma once

#include <vector>

#include "buffer.h"
#include "convert.h"
#include "network.h"
#include "plan.h"

namespace relu_mlp::cpu {

// A layer's product forward and that of its delta, but for the packed operand.
inline PairProduct layer_product(
    Matrix<BFloat16> out,
    Matrix<const BFloat16> a,
    bool relu) {
  return {
      out.rows, out.cols, a.cols, bits(a.data), a.row_stride, nullptr,
      bits(out.data), out.row_stride,
      relu ? Epilogue::bias_relu : Epilogue::bias};
}
inline PairProduct delta_product(
    Matrix<BFloat16> out,
    Matrix<const BFloat16> delta,
    Matrix<const BFloat16> mask) {
  return {
      out.rows, out.cols, delta.cols, bits(delta.data), delta.row_stride,
      nullptr, bits(out.data), out.row_stride,
      mask.data ? Epilogue::mask : Epilogue::store, nullptr, bits(mask.data),
      mask.row_stride};
}

class PairLayers {
 public:
  using Element = BFloat16;
  using Sum = float;
  static constexpr bool takes_any_strides = false;

  PairLayers(const Network<BFloat16>& network, const Strategy&, Uses uses)
      : kernels_(*chosen_instruction_set().pairs), layers_(network.layers.size()) {
    slots_.reserve(2 * layers_.size());
    biases_.reserve(layers_.size());
    const auto pack = [&](Matrix<const uint16_t> b) {
      uint32_t* const to =
          slots_.emplace_back(kernels_.packed_size(b.rows, b.cols)).get();
      kernels_.pack(to, b);
      return to;
    };
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const auto& [weight, bias] = network.layers[l];
      if (uses.forward) {
        layers_[l].transposed = pack(bits(weight).transposed());
      }
      if (uses.forward && bias) {
        float* const to = biases_.emplace_back(weight.rows).get();
        widen(to, bias, weight.rows);
        layers_[l].bias = to;
      }
      if (uses.backward(l)) {
        layers_[l].plain = pack(bits(weight));
      }
    }
  }

  // out = a W_l^T + b_l, then ReLU if asked for.
  void linear(
      std::size_t l,
      Matrix<Element> out,
      Matrix<const Element> a,
      bool relu) const {
    PairProduct product = layer_product(out, a, relu);
    product.b = layers_[l].transposed;
    product.bias = layers_[l].bias;
    kernels_.product(product);
  }

  // How much memory grad_weight needs for a block of `rows` rows.
  int64_t scratch_size(int64_t rows, int64_t widest) const {
    constexpr int64_t operands = 2, elements_of_slot = 2;
    return operands * elements_of_slot * kernels_.packed_size(rows, widest);
  }

  // to = delta^T a, or to += delta^T a.
  void grad_weight(
      Matrix<Sum> to,
      Matrix<const Element> delta,
      Matrix<const Element> a,
      bool add,
      Element* scratch) const {
    kernels_.grad_weight(
        to, bits(delta), bits(a), add, reinterpret_cast<uint32_t*>(scratch));
  }

  // out = delta W_l where mask > 0 or NaN, else 0; without a mask everywhere.
  void grad_input(
      std::size_t l,
      Matrix<Element> out,
      Matrix<const Element> delta,
      Matrix<const Element> mask) const {
    PairProduct product = delta_product(out, delta, mask);
    product.b = layers_[l].plain;
    kernels_.product(product);
  }

  // sums[j] += the sum of column j.
  void column_sums(double* sums, Matrix<const Element> delta) const {
    kernels_.column_sums(sums, bits(delta));
  }

 private:
  struct Packed {
    const uint32_t* transposed = nullptr; // weight^T (in, out), for a W^T
    const uint32_t* plain = nullptr; // weight (out, in), for delta W
    const float* bias = nullptr;
  };

  const PairKernels& kernels_;
  std::vector<Packed> layers_;
  std::vector<Buffer<uint32_t>> slots_;
  std::vector<Buffer<float>> biases_;
};

} // namespace relu_mlp::cpu
