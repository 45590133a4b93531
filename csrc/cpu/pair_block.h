// A network's layers in bfloat16 by products of pairs, where threads share every
// product: for rows that make one chunk, and for weights too large to be kept packed.
// Columns are dealt out, and each thread packs what it needs of the weight: what one
// core has written comes slowly to another. Bits do not depend on how columns are dealt.
//
// Where there is but one block of rows, every weight gradient is written once, in
// bfloat16 (Sum); else it is summed in float.
#pragma once

#include <type_traits>

#include "bf16_layers.h"

namespace relu_mlp::cpu {

template <typename S>
class PairBlock {
 public:
  using Element = BFloat16;
  using Sum = S;
  static constexpr bool takes_any_strides = false;

  PairBlock(const Network<BFloat16>& network, const Strategy&, Uses)
      : kernels_(*chosen_instruction_set().pairs), layers_(network.layers) {}

  // out = a W_l^T + b_l, then ReLU if asked for.
  void linear(
      std::size_t l,
      Matrix<Element> out,
      Matrix<const Element> a,
      bool relu) const {
    const auto& [weight, bias] = layers_[l];
    const Buffer<float> widened(bias ? out.cols : 0);
    PairProduct product = layer_product(out, a, relu);
    if (bias) {
      widen(widened.get(), bias, out.cols);
      product.bias = widened.get();
    }
    multiply(product, bits(weight).transposed());
  }

  int64_t scratch_size(int64_t, int64_t) const {
    return 0;
  }

  // to = delta^T a, or to += delta^T a. Of the operands, the one of the larger width is
  // dealt out, and packed once; the other is packed by every thread.
  void grad_weight(
      Matrix<Sum> to,
      Matrix<const Element> delta,
      Matrix<const Element> a,
      bool add,
      Element*) const {
    const bool by_rows = to.rows > to.cols;
    each_range(
        by_rows ? to.rows : to.cols,
        work_of_product(to.rows, to.cols, delta.rows),
        [&](int64_t begin, int64_t end) {
          const int64_t count = end - begin;
          const auto part =
              by_rows ? rows_of(to, begin, count) : columns_of(to, begin, count);
          const auto left = bits(by_rows ? columns_of(delta, begin, count) : delta);
          const auto right = bits(by_rows ? a : columns_of(a, begin, count));
          const Buffer<uint32_t> packed(
              kernels_.packed_size(delta.rows, part.rows) +
              kernels_.packed_size(delta.rows, part.cols));
          if constexpr (std::is_same_v<Sum, float>) {
            kernels_.grad_weight(part, left, right, add, packed.get());
          } else {
            kernels_.whole_grad_weight(
                {bits(part.data), part.rows, part.cols, part.row_stride, 1},
                left, right, false, packed.get());
          }
        });
  }

  // out = delta W_l where mask > 0 or NaN, else 0; without a mask everywhere.
  void grad_input(
      std::size_t l,
      Matrix<Element> out,
      Matrix<const Element> delta,
      Matrix<const Element> mask) const {
    multiply(delta_product(out, delta, mask), bits(layers_[l].weight));
  }

  // sums[j] += the sum of column j. Each column is summed by one thread.
  void column_sums(double* sums, Matrix<const Element> delta) const {
    constexpr int64_t of_an_element = 16;
    const int64_t work = of_an_element * delta.rows * delta.cols;
    each_range(delta.cols, work, [&](int64_t begin, int64_t end) {
      kernels_.column_sums(
          sums + begin, bits(columns_of(delta, begin, end - begin)));
    });
  }

 private:
  // The product with b, which is not packed yet.
  void multiply(const PairProduct& product, Matrix<const uint16_t> b) const {
    const int64_t work = work_of_product(product.m, b.cols, b.rows);
    each_range(b.cols, work, [&](int64_t begin, int64_t end) {
      const Buffer<uint32_t> packed(kernels_.packed_size(b.rows, end - begin));
      kernels_.pack(packed.get(), columns_of(b, begin, end - begin));
      PairProduct part = product;
      part.n = end - begin;
      part.b = packed.get();
      part.out += begin;
      part.bias += part.bias ? begin : 0;
      part.mask += part.mask ? begin : 0;
      kernels_.product(part);
    });
  }

  // Calls f(begin, end) for ranges of [0, count) that begin with a pair of tiles;
  // on several threads, if there is work enough to pay for waking them.
  template <typename F>
  static void each_range(int64_t count, int64_t work, const F& f) {
    constexpr int64_t pair = 32;
    const int64_t pairs = ceil_div(count, pair);
    parallel_for(
        pairs, work >= min_work ? 1 : pairs,
        [&](int64_t first, int64_t last) {
          f(first * pair, std::min(last * pair, count));
        });
  }

  const PairKernels& kernels_;
  const std::vector<Layer<Element>>& layers_;
};

} // namespace relu_mlp::cpu
