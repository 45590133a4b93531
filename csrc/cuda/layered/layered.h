// The passes of the wide regime: layer by layer, each product followed by one
// walk over its result where cuBLASLt cannot fuse what belongs there.
#pragma once

#include <algorithm>
#include <vector>

#include "../../tensor.h"
#include "../memory.h"
#include "layer_products.h"
#include "kernels.h"

namespace relu_mlp::cuda {

// A network as plain data. What a pass does not need has no data; biases may
// be null. widths are those of x, the hidden layers and y.
template <typename T>
struct Network {
  std::vector<int64_t> widths;
  Matrix<const T> x;
  std::vector<Matrix<const T>> weights; // contiguous
  std::vector<const T*> biases;
  Activation output_activation;

  std::size_t layers() const {
    return weights.size();
  }
};

// What the backward pass is asked for, beside `needs`.
template <typename T>
struct BackwardPass {
  Needs needs;
  bool recompute; // the hidden activations, and y
  std::vector<const T*> hidden; // a_1 ... a_{L-1}, contiguous
  const T* y; // contiguous

  // Either the gradient of y, of any strides, or, where `loss` is not null, the
  // target, contiguous, of *loss = loss_scale * sum (y - target)^2.
  Matrix<const T> grad_output;
  const T* target;
  double loss_scale;
  T* loss;

  // The results, contiguous; null where not needed.
  T* grad_x;
  std::vector<T*> grad_weights, grad_biases;
};

template <typename T>
Matrix<T> contiguous(T* data, int64_t rows, int64_t cols) {
  return {data, rows, cols, cols, 1};
}
template <typename T>
Matrix<const T> as_const(const Matrix<T>& m) {
  return {m.data, m.rows, m.cols, m.row_stride, m.col_stride};
}
// `count` rows, or columns, from the first on that is named.
template <typename T>
Matrix<T> rows_of(const Matrix<T>& m, int64_t first, int64_t count) {
  return {m.row(first), count, m.cols, m.row_stride, m.col_stride};
}
template <typename T>
Matrix<T> columns_of(const Matrix<T>& m, int64_t first, int64_t count) {
  return {
      m.data + first * m.col_stride, m.rows, count, m.row_stride, m.col_stride};
}

// `like` is a tensor on the device, for new ones.
template <typename T>
class WideLayers {
 public:
  WideLayers(const Network<T>& network, const Tensor& like, Stream stream)
      : network_(network),
        like_(like),
        stream_(stream),
        products_(like, stream) {}

  // y, unless it is null, and the hidden activations; those that `hidden` has
  // no place for live until the next layer has read them.
  void forward(const std::vector<T*>& hidden, T* y) {
    const std::size_t layers = network_.layers();
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
        next = empty<2>({a.rows, network_.widths[l + 1]}, like_);
        to = next.template data<T>();
      }
      const auto out = contiguous(to, a.rows, network_.widths[l + 1]);
      const bool relu =
          !is_last || network_.output_activation == Activation::relu;
      products_.linear(out, a, network_.weights[l], network_.biases[l], relu);
      a = as_const(out);
      memory = std::move(next);
    }
    if (network_.output_activation > Activation::relu) {
      activate(a);
    }
  }

  void backward(BackwardPass<T> pass) {
    const Needs& needs = pass.needs;
    const std::size_t layers = network_.layers();
    const std::size_t lowest = needs.lowest_layer();
    workspace_ = new_workspace(pass);
    std::vector<Tensor> recomputed;
    if (pass.recompute) {
      recomputed = recompute(pass);
    }
    Tensor memory; // of delta
    bool has_sums = true; // whether the bias gradient is there
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
        sum_up(delta, pass.grad_biases[l]);
        has_sums = true;
      }
      if (!needs.propagation_through(l)) {
        break;
      }
      Tensor next;
      T* to = pass.grad_x;
      if (l > 0) {
        next = empty<2>({delta.rows, network_.widths[l]}, like_);
        to = next.template data<T>();
      }
      const auto out = contiguous(to, delta.rows, network_.widths[l]);
      products_.grad_input(out, delta, network_.weights[l]);
      if (l > 0) {
        mask_delta(
            to, input(l, pass), sums(pass.grad_biases[l - 1]), stream_);
        if (pass.recompute) {
          recomputed[l - 1] = Tensor(); // nobody reads it any more
        }
      }
      delta = as_const(out);
      memory = std::move(next);
    }
  }

 private:
  // The gradients of the layers `low` and low + 1, where nothing below is asked
  // for: delta_{low+1} and, if it is computed again, a_{low+1} a few columns at
  // a time. Every sum runs over all rows, as it does without that. `delta` is
  // that of the layer above, whose bias gradient may still have to be made.
  void lowest_layers(
      std::size_t low,
      const Matrix<const T>& delta,
      bool has_sums,
      const BackwardPass<T>& pass) {
    const Needs& needs = pass.needs;
    const int64_t width = network_.widths[low + 1];
    const int64_t most = columns_at_once(
        delta.rows, width, pass.recompute, device_properties());
    const bool is_saved = low + 1 <= pass.hidden.size();
    const Tensor a_memory =
        is_saved ? Tensor() : empty<1>({delta.rows * most}, like_);
    const Tensor out_memory = empty<1>({delta.rows * most}, like_);
    for (int64_t first = 0; first < width; first += most) {
      const int64_t count = std::min(most, width - first);
      Matrix<const T> a;
      if (is_saved) {
        a = columns_of(input(low + 1, pass), first, count);
      } else {
        const auto to = contiguous(
            a_memory.template data<T>(), delta.rows, count);
        const T* const bias = network_.biases[low];
        products_.linear(
            to, input(low, pass), rows_of(network_.weights[low], first, count),
            bias ? bias + first : nullptr, true);
        a = as_const(to);
      }
      if (needs.weight(low + 1)) {
        has_sums |= products_.grad_weight(
            columns_of(grad_weight(low + 1, pass), first, count), delta, a,
            has_sums ? nullptr : pass.grad_biases[low + 1]);
      }
      const auto out = contiguous(
          out_memory.template data<T>(), delta.rows, count);
      products_.grad_input(
          out, delta, columns_of(network_.weights[low + 1], first, count));
      T* const total = pass.grad_biases[low];
      mask_delta(
          out.data, a, sums(total ? total + first : nullptr), stream_);
      if (needs.weight(low)) {
        products_.grad_weight(
            rows_of(grad_weight(low, pass), first, count), as_const(out),
            input(low, pass), nullptr);
      }
    }
    if (!has_sums) {
      sum_up(delta, pass.grad_biases[low + 1]);
    }
  }

  ColumnSums<T> sums(T* total) const {
    return {total, workspace_.template data<void>()};
  }

  // *total = the sums of delta's columns.
  void sum_up(const Matrix<const T>& delta, T* total) const {
    relu_mlp::cuda::output_delta<T>(
        Activation::none, nullptr, delta, nullptr, sums(total), stream_);
  }

  Matrix<T> grad_weight(std::size_t l, const BackwardPass<T>& pass) const {
    return contiguous(
        pass.grad_weights[l], network_.widths[l + 1], network_.widths[l]);
  }

  // Enough for the sums of every delta, whole or a few columns of it, which take
  // turns.
  Tensor new_workspace(const BackwardPass<T>& pass) const {
    const Device device = device_properties();
    int64_t bytes = 0;
    for (std::size_t l = 0; l < network_.layers(); ++l) {
      const bool is_last = l + 1 == network_.layers();
      if (pass.needs.bias(l) || (is_last && pass.loss)) {
        const int64_t cols = network_.widths[l + 1];
        const int64_t some =
            columns_at_once(rows(pass), cols, pass.recompute, device);
        for (const int64_t count : {cols, some, some ? cols % some : 0}) {
          bytes = std::max(bytes, columns_workspace(rows(pass), count, device));
        }
      }
    }
    return empty<1>({bytes / int64_t(sizeof(T)) + 1}, like_);
  }

  int64_t rows(const BackwardPass<T>& pass) const {
    return pass.loss ? network_.x.rows : pass.grad_output.rows;
  }

  // The hidden activations and, if it is needed, y, entered into `pass`; but
  // not what lowest_layers can compute itself.
  std::vector<Tensor> recompute(BackwardPass<T>& pass) {
    const std::size_t layers = network_.layers();
    const bool needs_y =
        pass.loss || network_.output_activation != Activation::none;
    if (layers == 2 && !needs_y && !pass.needs.propagation_through(0) &&
        pass.needs.lowest_layer() == 0) {
      return {};
    }
    std::vector<Tensor> memory;
    std::vector<T*> places;
    for (std::size_t l = 0; l + !needs_y < layers; ++l) {
      memory.push_back(
          empty<2>({network_.x.rows, network_.widths[l + 1]}, like_));
      places.push_back(memory.back().template data<T>());
    }
    T* const y = needs_y ? places.back() : nullptr;
    places.resize(layers - 1);
    forward(places, y);
    pass.hidden.assign(places.begin(), places.end());
    pass.y = y;
    return memory;
  }

  Matrix<const T> input(std::size_t l, const BackwardPass<T>& pass) const {
    return l == 0
        ? network_.x
        : contiguous(pass.hidden[l - 1], rows(pass), network_.widths[l]);
  }

  // delta_L: grad_output itself where phi is the identity and its rows lie
  // apart from each other; then its sums are still to be made. Else in `memory`.
  Matrix<const T> output_delta(
      const BackwardPass<T>& pass,
      Tensor& memory,
      bool& has_sums) {
    const Activation phi = network_.output_activation;
    const Matrix<const T>& grad = pass.grad_output;
    const std::size_t last = network_.layers() - 1;
    T* const total = pass.grad_biases[last];
    const int64_t count = rows(pass), cols = network_.widths[last + 1];
    if (!pass.loss && phi == Activation::none && grad.col_stride == 1 &&
        (grad.rows == 1 || grad.row_stride >= cols)) {
      has_sums = !total;
      return grad;
    }
    memory = empty<2>({count, cols}, like_);
    T* const delta = memory.template data<T>();
    if (pass.loss) {
      loss_delta(
          phi, delta, pass.y, pass.target, count, cols, pass.loss_scale,
          pass.loss, sums(total), stream_);
    } else {
      relu_mlp::cuda::output_delta(
          phi, delta, grad, phi == Activation::none ? nullptr : pass.y,
          sums(total), stream_);
    }
    return contiguous<const T>(delta, count, cols);
  }

  // phi in place, by PyTorch: its accuracy, its speed.
  void activate(const Matrix<const T>& y) const {
    const int64_t count = y.rows * y.cols, stride = 1;
    AtenTensorHandle handle;
    check_call(aoti_torch_create_tensor_from_blob(
        const_cast<T*>(y.data), 1, &count, &stride, 0, dtype_number<T>(),
        like_.device_type(), like_.device_index(), &handle));
    StableIValue stack = torch::stable::detail::from(handle);
    check_call(torch_call_dispatcher(
        network_.output_activation == Activation::sigmoid ? "aten::sigmoid_"
                                                          : "aten::tanh_",
        "", &stack, TORCH_ABI_VERSION));
    Tensor(torch::stable::detail::to<AtenTensorHandle>(stack));
  }

  const Network<T>& network_;
  const Tensor& like_;
  const Stream stream_;
  const Products<T> products_;
  Tensor workspace_;
};

} // namespace relu_mlp::cuda
