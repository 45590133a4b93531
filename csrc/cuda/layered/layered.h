// The layered passes: a product for each layer, followed by one kernel over its
// result if cuBLASLt cannot fuse that work into the product.
#pragma once

#include <algorithm>
#include <vector>

#include "../../operands.h"
#include "../memory.h"
#include "layer_products.h"
#include "kernels.h"

namespace relu_mlp::cuda {

// `like` is a tensor on the device. New tensors have its dtype and device.
template <typename T>
class LayeredPasses {
 public:
  LayeredPasses(const Network<T>& network, const Tensor& like, Stream stream)
      : network_(network),
        like_(like),
        stream_(stream),
        products_(like, stream) {}

  // Computes the hidden activations, and y unless it is null. A hidden
  // activation without a pointer in `hidden` is freed when the next layer has
  // read it.
  void forward(const std::vector<T*>& hidden, T* y) {
    const std::size_t layers = network_.layers.size();
    Matrix<const T> a = network_.x;
    Tensor memory;
    for (std::size_t l = 0; l < layers; ++l) {
      const bool is_last = l + 1 == layers;
      if (is_last && !y) {
        return;
      }
      Tensor next;
      T* to = y;
      if (!is_last && l < hidden.size()) {
        to = hidden[l];
      } else if (!is_last) {
        next = empty<2>({a.rows, network_.width(l + 1)}, like_);
        to = next.template data<T>();
      }
      const auto out = contiguous(to, a.rows, network_.width(l + 1));
      const bool relu =
          !is_last || network_.output_activation == Activation::relu;
      const Layer<T>& layer = network_.layers[l];
      products_.linear(out, a, layer.weight, layer.bias, relu);
      a = as_const(out);
      memory = std::move(next);
    }
    if (applied_by(network_.output_activation) != AppliedBy::epilogue) {
      activate(contiguous(y, a.rows, a.cols));
    }
  }

  void backward(BackwardPass<T> pass) {
    const Needs& needs = pass.needs;
    const std::size_t layers = network_.layers.size();
    const std::size_t lowest = needs.lowest_layer();
    workspace_ = new_workspace(pass);
    std::vector<Tensor> recomputed;
    if (pass.recompute) {
      recomputed = recompute(pass);
    }
    Tensor memory; // of delta
    bool has_sums = true; // whether the bias gradient is computed
    Matrix<const T> delta = output_delta(pass, memory, has_sums);
    for (std::size_t l = layers; l-- > lowest;) {
      if (l == lowest + 1 && !needs.propagation_through(lowest)) {
        lowest_layers(lowest, delta, has_sums, pass);
        return;
      }
      if (needs.weight(l)) {
        has_sums |= products_.grad_weight(
            grad_weight(l, pass), delta, input(l, pass),
            has_sums ? nullptr : pass.grad_biases[l]);
      }
      if (!has_sums) {
        sum_columns(delta, pass.grad_biases[l]);
        has_sums = true;
      }
      if (!needs.propagation_through(l)) {
        break;
      }
      Tensor next;
      T* to = pass.grad_x;
      if (l > 0) {
        next = empty<2>({delta.rows, network_.width(l)}, like_);
        to = next.template data<T>();
      }
      const auto out = contiguous(to, delta.rows, network_.width(l));
      products_.grad_input(out, delta, network_.layers[l].weight);
      if (l > 0) {
        mask_delta(to, input(l, pass), sums(pass.grad_biases[l - 1]), stream_);
        if (pass.recompute) {
          recomputed[l - 1] = Tensor(); // no longer read
        }
      }
      delta = as_const(out);
      memory = std::move(next);
    }
  }

 private:
  // The gradients of the layers `low` and low + 1, if nothing below them is
  // needed. delta_{low+1}, and a_{low+1} if it is recomputed, exist only a few
  // columns at a time. Every sum still runs over all rows at once. `delta` is
  // the delta of the layer above. `has_sums` says whether its bias gradient is
  // already computed.
  void lowest_layers(
      std::size_t low,
      const Matrix<const T>& delta,
      bool has_sums,
      const BackwardPass<T>& pass) {
    const Needs& needs = pass.needs;
    const int64_t width = network_.width(low + 1);
    const int64_t max_columns =
        columns_at_once(delta.rows, width, pass.recompute, device_properties());
    const bool is_saved = low + 1 <= pass.hidden.size();
    const Tensor a_memory =
        is_saved ? Tensor() : empty<1>({delta.rows * max_columns}, like_);
    const Tensor out_memory = empty<1>({delta.rows * max_columns}, like_);
    for (int64_t first = 0; first < width; first += max_columns) {
      const int64_t count = std::min(max_columns, width - first);
      Matrix<const T> a;
      if (is_saved) {
        a = columns_of(input(low + 1, pass), first, count);
      } else {
        const auto to =
            contiguous(a_memory.template data<T>(), delta.rows, count);
        const T* const bias = network_.layers[low].bias;
        products_.linear(
            to, input(low, pass),
            rows_of(network_.layers[low].weight, first, count),
            bias ? bias + first : nullptr, true);
        a = as_const(to);
      }
      if (needs.weight(low + 1)) {
        has_sums |= products_.grad_weight(
            columns_of(grad_weight(low + 1, pass), first, count), delta, a,
            has_sums ? nullptr : pass.grad_biases[low + 1]);
      }
      const auto out =
          contiguous(out_memory.template data<T>(), delta.rows, count);
      products_.grad_input(
          out, delta,
          columns_of(network_.layers[low + 1].weight, first, count));
      T* const total = pass.grad_biases[low];
      mask_delta(out.data, a, sums(total ? total + first : nullptr), stream_);
      if (needs.weight(low)) {
        products_.grad_weight(
            rows_of(grad_weight(low, pass), first, count), as_const(out),
            input(low, pass), nullptr);
      }
    }
    if (!has_sums) {
      sum_columns(delta, pass.grad_biases[low + 1]);
    }
  }

  ColumnSums<T> sums(T* total) const {
    return {total, workspace_.template data<void>()};
  }

  // *total = the sums of delta's columns.
  void sum_columns(const Matrix<const T>& delta, T* total) const {
    relu_mlp::cuda::output_delta<T>(
        Activation::none, nullptr, delta, nullptr, sums(total), stream_);
  }

  Matrix<T> grad_weight(std::size_t l, const BackwardPass<T>& pass) const {
    return contiguous(
        pass.grad_weights[l], network_.width(l + 1), network_.width(l));
  }

  // Enough workspace for the sums of any delta, whole or a few columns of it.
  // All sums use it in turn.
  Tensor new_workspace(const BackwardPass<T>& pass) const {
    const DeviceProperties device = device_properties();
    int64_t bytes = 0;
    for (std::size_t l = 0; l < network_.layers.size(); ++l) {
      const bool is_last = l + 1 == network_.layers.size();
      if (pass.needs.bias(l) || (is_last && pass.loss)) {
        const int64_t cols = network_.width(l + 1);
        const int64_t some =
            columns_at_once(network_.x.rows, cols, pass.recompute, device);
        for (const int64_t count : {cols, some, some ? cols % some : 0}) {
          bytes = std::max(
              bytes, reduction_workspace(network_.x.rows, count, device));
        }
      }
    }
    return empty<1>({bytes / int64_t(sizeof(T)) + 1}, like_);
  }

  // Computes the hidden activations, and y if it is needed, and sets them in
  // `pass`. Skips the activations that lowest_layers computes itself.
  std::vector<Tensor> recompute(BackwardPass<T>& pass) {
    const std::size_t layers = network_.layers.size();
    const bool needs_y = pass.reads_y(network_.output_activation);
    if (layers == 2 && !needs_y && !pass.needs.propagation_through(0) &&
        pass.needs.lowest_layer() == 0) {
      return {};
    }
    std::vector<Tensor> memory;
    std::vector<T*> places;
    for (std::size_t l = 0; l + !needs_y < layers; ++l) {
      memory.push_back(
          empty<2>({network_.x.rows, network_.width(l + 1)}, like_));
      places.push_back(memory.back().template data<T>());
    }
    T* const y = needs_y ? places.back() : nullptr;
    places.resize(layers - 1);
    forward(places, y);
    for (std::size_t l = 1; l < layers; ++l) {
      pass.hidden.push_back(as_const(
          contiguous(places[l - 1], network_.x.rows, network_.width(l))));
    }
    if (y) {
      pass.y = as_const(contiguous(y, network_.x.rows, network_.width(layers)));
    }
    return memory;
  }

  Matrix<const T> input(std::size_t l, const BackwardPass<T>& pass) const {
    return l == 0 ? network_.x : pass.hidden[l - 1];
  }

  // Returns delta_L. This is grad_output itself if phi is the identity and no
  // two rows overlap; its sums are then still missing. Otherwise `memory` owns
  // it.
  Matrix<const T> output_delta(
      const BackwardPass<T>& pass,
      Tensor& memory,
      bool& has_sums) {
    const Activation phi = network_.output_activation;
    const Matrix<const T>& grad = pass.grad_output;
    const std::size_t last = network_.layers.size() - 1;
    T* const total = pass.grad_biases[last];
    const int64_t count = network_.x.rows, cols = network_.width(last + 1);
    if (!pass.loss && phi == Activation::none && grad.col_stride == 1 &&
        (grad.rows == 1 || grad.row_stride >= cols)) {
      has_sums = !total;
      return grad;
    }
    memory = empty<2>({count, cols}, like_);
    T* const delta = memory.template data<T>();
    if (pass.loss) {
      loss_delta(
          phi, delta, pass.y.data, pass.target.values.data, count, cols,
          pass.loss_scale, pass.loss, sums(total), stream_);
    } else {
      relu_mlp::cuda::output_delta(
          phi, delta, grad, phi == Activation::none ? nullptr : pass.y.data,
          sums(total), stream_);
    }
    return contiguous<const T>(delta, count, cols);
  }

  // y = phi(y).
  void activate(const Matrix<T>& y) const {
    const int64_t count = y.rows * y.cols;
    with_row(network_.output_activation, [&]<typename Row>() {
      if constexpr (Row::applied_by == AppliedBy::pytorch) {
        apply_in_place(
            Row::in_place, y.data, count, like_.device_type(),
            like_.device_index());
      } else {
        apply_activation(network_.output_activation, y.data, count, stream_);
      }
    });
  }

  const Network<T>& network_;
  const Tensor& like_;
  const Stream stream_;
  const LayerProducts<T> products_;
  Tensor workspace_;
};

} // namespace relu_mlp::cuda
