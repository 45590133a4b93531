// The layers of a bfloat16 network with products of bfloat16 (dpbf16 or AMX).
// Activations and deltas stay in bfloat16, as on the native path.
//
// S is the type that weight gradients are summed in: float, or bfloat16 for a
// single block of rows, which writes every weight gradient once.
//
// There are two ways to use threads. Each chunk of rows has a thread, and
// weights are packed once for many blocks (Pack::once). Or threads share every
// product by its columns, and each thread packs its own columns of the weight
// (Pack::per_use), because a core reads data slowly that another core has just
// written. The split of the columns does not change the bits.
#pragma once

#include <type_traits>
#include <vector>

#include "buffer.h"
#include "convert.h"
#include "layers.h"
#include "sharing.h"

namespace relu_mlp::cpu {

template <typename S>
class Bf16Layers {
 public:
  using Element = BFloat16;
  using Sum = S;
  static constexpr bool takes_any_strides = false;

  template <typename ProductNeeds>
  Bf16Layers(
      const Network<BFloat16>& network,
      const Plan& plan,
      const ProductNeeds& needs)
      : kernels_(*chosen_instruction_set().bf16),
        sharing_(plan),
        layers_(network.layers),
        packing_(plan.packing),
        packed_(layers_.size()) {
    words_.reserve(2 * layers_.size());
    biases_.reserve(layers_.size());
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const auto& [weight, bias] = layers_[l];
      if (needs.forward(l) && packing_[l].forward == Pack::once) {
        packed_[l].transposed = pack(bits(weight).transposed());
      }
      if (needs.forward(l) && bias) {
        float* const to = biases_.emplace_back(weight.rows).get();
        widen(to, bias, weight.rows);
        packed_[l].bias = to;
      }
      if (needs.grad_input(l) && packing_[l].grad_input == Pack::once) {
        packed_[l].plain = pack(bits(weight));
      }
    }
  }

  void forward(
      std::size_t l,
      Matrix<Element> z,
      Matrix<const Element> a,
      bool relu) const {
    Bf16ProductArgs product = product_of(z, a);
    product.epilogue = relu ? Epilogue::bias_relu : Epilogue::bias;
    product.bias = packed_[l].bias;
    multiply(
        product, packing_[l].forward, packed_[l].transposed,
        bits(layers_[l].weight).transposed());
  }

  // Scratch for both packed operands of grad_weight. If threads share the
  // product, each thread allocates its own.
  int64_t scratch_size(int64_t rows, int64_t widest) const {
    constexpr int64_t operands = 2, elements_of_word = 2;
    return sharing_.is_shared()
        ? 0
        : operands * elements_of_word * kernels_.packed_size(rows, widest);
  }

  void grad_weight(
      std::size_t,
      Matrix<Sum> sum,
      Matrix<const Element> delta,
      Matrix<const Element> a,
      bool add,
      Element* scratch) const {
    if (sharing_.is_shared()) {
      share_grad_weight(sum, delta, a, add);
    } else {
      grad_weight_by(
          sum, bits(delta), bits(a), add, reinterpret_cast<uint32_t*>(scratch));
    }
  }

  void grad_input(
      std::size_t l,
      Matrix<Element> out,
      Matrix<const Element> delta,
      Matrix<const Element> mask) const {
    Bf16ProductArgs product = product_of(out, delta);
    product.epilogue = mask.data ? Epilogue::mask : Epilogue::store;
    product.mask = bits(mask.data);
    product.mask_row = mask.row_stride;
    multiply(
        product, packing_[l].grad_input, packed_[l].plain,
        bits(layers_[l].weight));
  }

  // One thread sums each column.
  void grad_bias(double* sums, Matrix<const Element> delta) const {
    const int64_t work = sharing_.work_to_pack(delta.rows, delta.cols);
    for_each_range(delta.cols, work, [&](int64_t begin, int64_t end) {
      kernels_.column_sums(
          sums + begin, bits(columns_of(delta, begin, end - begin)));
    });
  }

 private:
  struct PackedLayer { // null pointers if not packed once
    const uint32_t* transposed = nullptr; // weight^T (in, out), for a W^T
    const uint32_t* plain = nullptr; // weight (out, in), for delta W
    const float* bias = nullptr; // (out)
  };

  const uint32_t* pack(Matrix<const uint16_t> b) {
    uint32_t* const to =
        words_.emplace_back(kernels_.packed_size(b.rows, b.cols)).get();
    kernels_.pack(to, b);
    return to;
  }

  // A product without its right operand and epilogue.
  static Bf16ProductArgs product_of(
      Matrix<Element> out,
      Matrix<const Element> a) {
    return {out.rows,     out.cols, a.cols,         bits(a.data),
            a.row_stride, nullptr,  bits(out.data), out.row_stride};
  }

  // Multiplies by b. `packed` is the packed copy of b if `pack` is Pack::once.
  void multiply(
      Bf16ProductArgs product,
      Pack pack,
      const uint32_t* packed,
      Matrix<const uint16_t> b) const {
    if (pack == Pack::once) {
      product.b = packed;
      kernels_.product(product);
      return;
    }
    const int64_t work = sharing_.work_of_product(product.m, b.cols, b.rows);
    for_each_range(b.cols, work, [&](int64_t begin, int64_t end) {
      const Buffer<uint32_t> words(kernels_.packed_size(b.rows, end - begin));
      kernels_.pack(words.get(), columns_of(b, begin, end - begin));
      Bf16ProductArgs part = product;
      part.n = end - begin;
      part.b = words.get();
      part.out += begin;
      part.bias += part.bias ? begin : 0;
      part.mask += part.mask ? begin : 0;
      kernels_.product(part);
    });
  }

  // Splits the wider operand among the threads, so it is packed once. Every
  // thread packs the whole of the other operand.
  void share_grad_weight(
      Matrix<Sum> sum,
      Matrix<const Element> delta,
      Matrix<const Element> a,
      bool add) const {
    const bool by_rows = sum.rows > sum.cols;
    for_each_range(
        by_rows ? sum.rows : sum.cols,
        sharing_.work_of_product(sum.rows, sum.cols, delta.rows),
        [&](int64_t begin, int64_t end) {
          const int64_t count = end - begin;
          const auto part = by_rows ? rows_of(sum, begin, count)
                                    : columns_of(sum, begin, count);
          const auto left =
              bits(by_rows ? columns_of(delta, begin, count) : delta);
          const auto right = bits(by_rows ? a : columns_of(a, begin, count));
          const Buffer<uint32_t> scratch(
              kernels_.packed_size(delta.rows, part.rows) +
              kernels_.packed_size(delta.rows, part.cols));
          grad_weight_by(part, left, right, add, scratch.get());
        });
  }

  void grad_weight_by(
      Matrix<Sum> sum,
      Matrix<const uint16_t> delta,
      Matrix<const uint16_t> a,
      bool add,
      uint32_t* scratch) const {
    if constexpr (std::is_same_v<Sum, float>) {
      kernels_.grad_weight(sum, delta, a, add, scratch);
    } else { // a single block never adds
      kernels_.grad_weight_rounded(
          {bits(sum.data), sum.rows, sum.cols, sum.row_stride, 1}, delta, a,
          scratch);
    }
  }

  // Calls f(begin, end) for ranges of [0, count) that begin at a multiple of
  // column_step.
  template <typename F>
  void for_each_range(int64_t count, int64_t work, const F& f) const {
    constexpr int64_t step = Bf16Kernels::column_step;
    sharing_.for_each_range(
        ceil_div(count, step), work, [&](int64_t first, int64_t last) {
          f(first * step, std::min(last * step, count));
        });
  }

  const Bf16Kernels& kernels_;
  const Sharing sharing_;
  const std::vector<Layer<Element>>& layers_;
  const std::vector<LayerPacking>& packing_;
  std::vector<PackedLayer> packed_;
  std::vector<Buffer<uint32_t>> words_;
  std::vector<Buffer<float>> biases_;
};

} // namespace relu_mlp::cpu
