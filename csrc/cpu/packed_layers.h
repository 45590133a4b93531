// A network's layers by this package's own products. They compute in the type
// compute_t<T>, so parameters in bfloat16 and float16 are widened once.
#pragma once

#include <vector>

#include "convert.h"
#include "network.h"
#include "products.h"
#include "plan.h"

namespace relu_mlp::cpu {

template <typename T>
class OwnLayers {
 public:
  using Element = compute_t<T>; // of a block of activations or deltas
  using Sum = compute_t<T>; // that weight gradients are summed in
  static constexpr bool takes_any_strides = true; // of a delta

  OwnLayers(const Network<T>& network, const Strategy& strategy, Uses uses)
      : products_(chosen_kernels<T>(), strategy.chunks == 1),
        rows_(network.x.rows),
        layers_(network.layers.size()) {
    // The parameters as the products want them. What serves several blocks of rows is
    // packed once.
    const bool is_one_block = rows_ <= strategy.block;
    constexpr std::size_t most_of_layer = 4;
    memory_.reserve(most_of_layer * layers_.size());
    const auto memory = [&](int64_t count) {
      return memory_.emplace_back(count).get();
    };
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const auto& [weight, bias] = network.layers[l];
      Prepared& layer = layers_[l];
      if (!uses.forward && !uses.backward(l)) {
        continue;
      }
      const int64_t out = weight.rows, in = weight.cols;
      layer.weight = widened(weight, memory(widened_size<T>(out * in)));
      if (uses.forward && bias) {
        layer.bias =
            widened(contiguous(bias, 1, out), memory(widened_size<T>(out))).data;
      }
      if (uses.forward && rows_ >= min_rows_to_transpose &&
          (!is_one_block || out * in <= few_weights)) {
        layer.transposed = products_.pack(
            layer.weight.transposed(), memory(products_.packed_size(in, out)));
      }
      if (!uses.backward(l)) {
        continue;
      }
      if (!products_.collides(layer.weight, rows_)) {
        layer.plain =
            products_.panels(layer.weight, memory(products_.size_beside(out)));
      } else if (!is_one_block) {
        layer.plain =
            products_.pack(layer.weight, memory(products_.packed_size(out, in)));
      }
    }
  }
  ~OwnLayers() {
    while (!memory_.empty()) { // the last one first, as Scratch has it
      memory_.pop_back();
    }
  }

  // out = a W_l^T + b_l, then ReLU if asked for.
  void linear(
      std::size_t l,
      Matrix<Element> out,
      Matrix<const Element> a,
      bool relu) const {
    const auto& [weight, transposed, plain, bias] = layers_[l];
    const Finish<Element> finish{
        relu ? Epilogue::bias_relu : Epilogue::bias, bias};
    if (transposed.data) {
      products_.multiply(out, a, transposed, finish);
    } else if (rows_ < min_rows_for_panels(weight)) {
      products_.linear(out, a, weight, bias, relu);
    } else if (rows_ <= one_panel && rows_ <= weight.rows) {
      products_.linear_transposed(out, a, weight, bias, relu);
    } else {
      products_.pack_and_multiply(out, a, weight.transposed(), finish);
    }
  }

  // How much memory grad_weight needs for a block of `rows` rows.
  int64_t scratch_size(int64_t rows, int64_t) const {
    return products_.size_beside(rows);
  }

  // to = delta^T a, or to += delta^T a.
  void grad_weight(
      Matrix<Sum> to,
      Matrix<const Element> delta,
      Matrix<const Element> a,
      bool add,
      Element* scratch) const {
    const Finish<Element> finish{Epilogue::store, nullptr, {}, add};
    if (products_.collides(a, to.rows)) {
      products_.pack_and_multiply(to, delta.transposed(), a, finish);
    } else {
      products_.multiply(
          to, delta.transposed(), products_.panels(a, scratch), finish);
    }
  }

  // out = delta W_l where mask > 0 or NaN, else 0; without a mask everywhere.
  void grad_input(
      std::size_t l,
      Matrix<Element> out,
      Matrix<const Element> delta,
      Matrix<const Element> mask) const {
    const Prepared& layer = layers_[l];
    const Finish<Element> finish{
        mask.data ? Epilogue::mask : Epilogue::store, nullptr, mask};
    if (layer.plain.data) {
      products_.multiply(out, delta, layer.plain, finish);
    } else {
      products_.pack_and_multiply(out, delta, layer.weight, finish);
    }
  }

  // sums[j] += the sum of column j.
  void column_sums(double* sums, Matrix<const Element> delta) const {
    products_.column_sums(sums, delta);
  }

 private:
  struct Prepared {
    Matrix<const Element> weight;
    Panels<Element> transposed; // weight^T (in, out), for a W^T
    Panels<Element> plain; // weight (out, in), for delta W; or packed late
    const Element* bias = nullptr;
  };

  // With fewer rows a transposed copy costs more than it saves.
  static constexpr int64_t min_rows_to_transpose = 6;
  // A larger weight that serves a single block is transposed panel by panel; or the
  // rows are, if there are few; or nothing is, if they would not fill a panel, or hardly,
  // and the weight does not fit into the second-level cache.
  static constexpr int64_t few_weights = 1 << 15, many_weights = 1 << 18;
  static constexpr int64_t one_panel = 64;
  static int64_t min_rows_for_panels(Matrix<const Element> weight) {
    return weight.rows * weight.cols > many_weights ? 24 : 16;
  }

  const Products<Element> products_;
  const int64_t rows_;
  std::vector<Prepared> layers_;
  std::vector<Buffer<Element>> memory_;
};

} // namespace relu_mlp::cpu
