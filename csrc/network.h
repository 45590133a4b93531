// A call of an operator as plain data: the network, and the operands and
// results of its backward pass. The passes of every device work on this data.
// Nothing here depends on PyTorch.
#pragma once

#include <algorithm>
#include <vector>

#include "mlp.h"

namespace relu_mlp {

// An operand that a pass does not read has no data. It has its width if the
// width is known.
template <typename T>
struct Layer {
  Matrix<const T> weight; // (out_features, in_features), rows contiguous
  const T* bias; // (out_features), contiguous; null for none
};

// Replaces `count` contiguous elements z by phi(z), for activations that no
// epilogue applies.
template <typename T>
using Activate = void (*)(Activation phi, T* z, int64_t count);

template <typename T>
struct Network {
  Matrix<const T> x; // (rows, in_features), rows contiguous
  std::vector<Layer<T>> layers;
  Activation output_activation;
  Activate<T> activate; // null if the device applies activations itself

  int64_t width(std::size_t l) const { // of the input of layer l, or of y
    return l < layers.size() ? layers[l].weight.cols
                             : layers.back().weight.rows;
  }
  // The widths of the inputs of the layers from `first` on, and of y.
  std::vector<int64_t> widths(std::size_t first = 0) const {
    std::vector<int64_t> all;
    all.reserve(layers.size() + 1 - first);
    for (std::size_t l = first; l <= layers.size(); ++l) {
      all.push_back(width(l));
    }
    return all;
  }
  // The largest width from width(first) on.
  int64_t widest(std::size_t first) const {
    int64_t widest = 0;
    for (std::size_t l = first; l <= layers.size(); ++l) {
      widest = std::max(widest, width(l));
    }
    return widest;
  }
};

// What a loss compares y with.
template <typename T>
struct Target {
  // Of the shape of y, contiguous. For cross entropy these are probabilities,
  // and `classes` may be given instead.
  Matrix<const T> values = {};
  // (rows, 1), contiguous: a class from 0 on, or ignored_class.
  Matrix<const int64_t> classes = {};
};

template <typename T>
Target<T> rows_of(const Target<T>& target, int64_t first, int64_t rows) {
  const auto part = [&](const auto& m) {
    return m.data ? rows_of(m, first, rows) : m;
  };
  return {part(target.values), part(target.classes)};
}

// The operands and results of a backward pass. An operand that `needs` does not
// require has no data.
template <typename T>
struct BackwardPass {
  Needs needs;

  // a_1 ... a_{L-1}, contiguous, and y. With `recompute` they are missing, and
  // the pass recomputes them.
  bool recompute = false;
  std::vector<Matrix<const T>> hidden = {};
  Matrix<const T> y = {};

  // Gradients that reach a_1 ... a_{L-1} from elsewhere, contiguous: one for
  // each, without data if it is 0, or none. CUDA's passes take none.
  std::vector<Matrix<const T>> grad_hidden = {};

  // If `loss` is null: the gradient of y, of any strides. Otherwise the pass
  // writes the loss to *loss, and propagates its gradient. set_loss() sets these
  // four members.
  Matrix<const T> grad_output = {};
  Loss kind_of_loss = Loss::sse;
  Target<T> target = {};
  double loss_scale = 0;
  T* loss = nullptr;

  // The results, contiguous; null if not needed.
  T* grad_x = nullptr;
  std::vector<T*> grad_weights = {}, grad_biases = {};

  bool reads_y(Activation output_activation) const {
    return loss || needs.reads_y(output_activation);
  }
};

// The factor of the sum in a loss of these rows. It is infinite for a mean over
// nothing, which makes the loss NaN, as in PyTorch.
template <typename T>
double loss_scale(Loss loss, const Target<T>& target) {
  const Matrix<const T>& values = target.values;
  switch (loss) {
    case Loss::sse:
      return 1.0;
    case Loss::half_sse:
      return 0.5;
    case Loss::mse:
    case Loss::l1:
    case Loss::huber:
    case Loss::bce_with_logits:
      return 1.0 / double(values.rows * values.cols);
    case Loss::cross_entropy: {
      if (!target.classes.data) {
        return 1.0 / double(values.cols > 0 ? values.rows : 0);
      }
      const int64_t *begin = target.classes.data,
                    *end = begin + target.classes.rows;
      return 1.0 / double(end - begin - std::count(begin, end, ignored_class));
    }
  }
  return 0.0; // not reached
}

// Makes a pass compute this loss of its rows at *result. A caller that trains
// batch by batch calls it for every batch.
template <typename T>
void set_loss(
    BackwardPass<T>& pass,
    Loss loss,
    const Target<T>& target,
    T* result) {
  pass.kind_of_loss = loss;
  pass.target = target;
  pass.loss_scale = loss_scale(loss, target);
  pass.loss = result;
}

// The operands and results of the vector-Jacobian product of a backward pass.
// relu_mlp/second_order.py has the formulas. The network has x and the weights
// that the backward pass read, and no biases.
template <typename T>
struct VjpPass {
  // What else the backward pass read: a_1 ... a_{L-1}, contiguous; y, rows
  // contiguous; and the gradient of y, of any strides.
  std::vector<Matrix<const T>> hidden = {};
  Matrix<const T> y = {};
  Matrix<const T> grad_output = {};

  // The gradients that reach the results of the backward pass, as a network of
  // the same shape: x', W_l' and b_l'. One without data is 0.
  Network<T> tangents = {};

  // The results, contiguous; null if not wanted: the gradients of grad_output
  // and y (rows, out_features), of every weight, and of x, a_1 ... a_{L-1}.
  T* of_grad_output = nullptr;
  T* of_y = nullptr;
  std::vector<T*> of_weights = {}, of_inputs = {};
};

} // namespace relu_mlp
