// A network in double precision, with a bound on the rounding error of every
// number (Higham's gamma_n, as in tests/support/bounds.py).
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "../../csrc/mlp.h"

namespace relu_mlp::cpu {

using Numbers = std::vector<double>;

// What the driver computes with. All matrices are contiguous.
struct NetworkNumbers {
  int64_t rows;
  std::vector<int64_t> sizes; // the widths of x, of the hidden layers and of y
  Activation activation;
  bool is_finite; // else some operands hold infinity or NaN
  Numbers x, grad; // of y
  std::vector<Numbers> weights, biases; // a bias without elements is missing

  std::size_t layers() const {
    return weights.size();
  }
  bool has_relu(std::size_t l) const {
    return l + 1 < layers() || activation == Activation::relu;
  }
};

// The unit roundoff of sums and of the numbers in memory, and the smallest
// difference between numbers in memory.
struct Rounding {
  double of_sums, of_results, smallest;

  // The relative error of a sum of products. The 40 stand for a bias, for the
  // sums of chunks, and for the rounding of this reference.
  double of_sum(int64_t terms) const {
    const double n = double(terms + 40) * of_sums;
    return n / (1 - n);
  }
};

// Numbers, and how far from them a result may be.
struct Bounded {
  Numbers value, error;

  explicit Bounded(std::size_t count) : value(count), error(count) {}
  Bounded(Numbers exact) : value(std::move(exact)), error(value.size()) {}
  // Adds the error of a sum whose terms have the sum `magnitude`, and of its
  // rounding to memory.
  void round(std::size_t n, double magnitude, double of_sum, Rounding by) {
    error[n] += of_sum * magnitude;
    error[n] += by.of_results * (std::abs(value[n]) + error[n]) + by.smallest;
  }
};

// A matrix with a bound on the error of every element, or a part of one.
struct BoundedMatrix {
  Matrix<const double> value, error;

  BoundedMatrix(const Bounded& numbers, int64_t rows, int64_t cols)
      : value(contiguous(numbers.value.data(), rows, cols)),
        error(contiguous(numbers.error.data(), rows, cols)) {}
  BoundedMatrix transposed() const {
    BoundedMatrix result = *this;
    result.value = value.transposed();
    result.error = error.transposed();
    return result;
  }
};

// left right, rounded to memory. Zeros in `left` are skipped if all numbers are
// finite.
inline Bounded product_reference(
    const BoundedMatrix& left,
    const BoundedMatrix& right,
    bool is_finite,
    Rounding rounding) {
  const int64_t rows = left.value.rows, cols = right.value.cols;
  const int64_t terms = left.value.cols;
  const double of_sum = rounding.of_sum(terms);
  Bounded result(std::size_t(rows * cols));
  for (int64_t r = 0; r < rows; ++r) {
    double* const value = result.value.data() + r * cols;
    double* const error = result.error.data() + r * cols;
    for (int64_t k = 0; k < terms; ++k) {
      const double a = left.value.at(r, k), a_error = left.error.at(r, k);
      if (is_finite && a == 0 && a_error == 0) {
        continue;
      }
      const double of_right = a_error + of_sum * (std::abs(a) + a_error);
      for (int64_t c = 0; c < cols; ++c) {
        const double b = right.value.at(k, c), b_error = right.error.at(k, c);
        value[c] += a * b;
        error[c] += of_right * (std::abs(b) + b_error) + std::abs(a) * b_error;
      }
    }
  }
  for (std::size_t n = 0; n < result.value.size(); ++n) {
    result.round(n, 0, 0, rounding);
  }
  return result;
}

inline double activated(Activation phi, double z) {
  return with_row(phi, [=]<typename Row>() { return Row::forward(z); });
}

// phi(a W^T + b) of one layer, whose input a is exact.
inline Bounded forward_reference(
    const NetworkNumbers& net,
    std::size_t l,
    const Numbers& a,
    Rounding rounding) {
  const int64_t in = net.sizes[l], out = net.sizes[l + 1];
  const Activation phi = net.has_relu(l) ? Activation::relu
      : l + 1 < net.layers()             ? Activation::none
                                         : net.activation;
  const bool is_smooth = phi != Activation::none && phi != Activation::relu;
  Bounded z(std::size_t(net.rows * out));
  for (int64_t r = 0; r < net.rows; ++r) {
    for (int64_t i = 0; i < out; ++i) {
      const double bias = net.biases[l].empty() ? 0 : net.biases[l][i];
      double sum = bias, magnitude = std::abs(bias);
      for (int64_t j = 0; j < in; ++j) {
        const double product = a[r * in + j] * net.weights[l][i * in + j];
        sum += product;
        magnitude += std::abs(product);
      }
      const std::size_t n = r * out + i;
      z.value[n] = sum;
      z.round(n, magnitude, rounding.of_sum(in), rounding);
      z.value[n] = activated(phi, sum);
      if (is_smooth) { // the derivatives of sigmoid and tanh are at most 1
        z.round(n, std::abs(z.value[n]), rounding.of_sum(0), rounding);
      }
    }
  }
  return z;
}

// grad * phi'(z_L), where y = phi(z_L).
inline Bounded activation_backward_reference(
    const NetworkNumbers& net,
    const Bounded& grad,
    const Numbers& y,
    Rounding rounding) {
  Bounded delta(y.size());
  for (std::size_t n = 0; n < y.size(); ++n) {
    delta.value[n] = with_row(net.activation, [&]<typename Row>() {
      return Row::backward(grad.value[n], y[n]);
    });
    if (net.activation == Activation::relu && y[n] <= 0) {
      continue;
    }
    // |phi'| <= 1, and of_sum(0) covers the operations of any phi'.
    delta.error[n] = grad.error[n];
    delta.round(
        n, std::abs(grad.value[n]) + grad.error[n], rounding.of_sum(0),
        rounding);
  }
  return delta;
}

// numbers = 0 where a <= 0.
inline void mask(Bounded& numbers, const Numbers& a) {
  for (std::size_t n = 0; n < a.size(); ++n) {
    if (a[n] <= 0) {
      numbers.value[n] = numbers.error[n] = 0;
    }
  }
}

inline double largest_of(const Bounded& numbers) {
  double largest = 0;
  for (const double n : numbers.value) {
    largest = std::max(largest, std::abs(n));
  }
  return largest;
}

struct Gradients {
  Bounded x;
  std::vector<Bounded> weights, biases;
  std::vector<Bounded> deltas; // the gradient of each layer's z
  double largest; // the largest element of x and the deltas
};

// The gradients for a gradient of y, given the activations that a forward pass
// has found: x, a_1 ... a_{L-1}, y. `grad_hidden` is what else reaches
// a_1 ... a_{L-1}: one for each, without elements if it is 0, or none.
inline Gradients backward_reference(
    const NetworkNumbers& net,
    const std::vector<Numbers>& a,
    const Numbers& grad,
    const std::vector<Numbers>& grad_hidden,
    Rounding rounding) {
  const std::size_t layers = net.layers();
  const std::vector<Bounded> none(layers, Bounded(0));
  Gradients result{Bounded(0), none, none, none, 0};
  Bounded delta = activation_backward_reference(net, grad, a.back(), rounding);
  result.largest = largest_of(delta);
  const Bounded ones(Numbers(net.rows, 1));
  for (std::size_t l = layers; l-- > 0;) {
    const int64_t in = net.sizes[l], out = net.sizes[l + 1];
    const Bounded input(a[l]), weight(net.weights[l]);
    const BoundedMatrix of_rows(delta, net.rows, out);
    result.weights[l] = product_reference(
        of_rows.transposed(), {input, net.rows, in}, net.is_finite, rounding);
    result.biases[l] = product_reference(
        {ones, 1, net.rows}, of_rows, net.is_finite, rounding);
    Bounded below =
        product_reference(of_rows, {weight, out, in}, net.is_finite, rounding);
    if (l > 0) {
      if (!grad_hidden.empty() && !grad_hidden[l - 1].empty()) {
        for (std::size_t n = 0; n < below.value.size(); ++n) {
          below.value[n] += grad_hidden[l - 1][n];
          below.round(n, 0, 0, rounding);
        }
      }
      mask(below, a[l]);
    }
    result.largest = std::max(result.largest, largest_of(below));
    result.deltas[l] = std::move(delta);
    delta = std::move(below);
  }
  result.x = std::move(delta);
  return result;
}

// The gradients that reach the results of a backward pass: x', W_l' and b_l'.
// One without elements is 0.
struct Tangents {
  Numbers x;
  std::vector<Numbers> weights, biases;
};

// The vector-Jacobian product of a backward pass.
struct VjpGradients {
  Bounded of_grad_output, of_y;
  std::vector<Bounded> of_weights, of_inputs;
  double largest; // the largest element of the tangents z_l' and of their terms
};

// It is computed from what the backward pass has read, and from its deltas.
// relu_mlp/second_order.py has the formulas. A product with a tangent that is
// missing is 0, even where the other operand is infinite or NaN.
inline VjpGradients vjp_reference(
    const NetworkNumbers& net,
    const std::vector<Numbers>& a,
    const std::vector<Bounded>& deltas,
    const Tangents& tangents,
    Rounding rounding) {
  const std::size_t layers = net.layers();
  const Bounded zeros_of_y(net.grad.size());
  VjpGradients result{zeros_of_y, zeros_of_y, {}, {}, 0};
  std::optional<Bounded> tangent; // of the layer's input, unless it is missing
  if (!tangents.x.empty()) {
    tangent = Bounded(tangents.x);
  }
  for (std::size_t l = 0; l < layers; ++l) {
    const int64_t rows = net.rows, in = net.sizes[l], out = net.sizes[l + 1];
    const Bounded input(a[l]), weight(net.weights[l]);
    const Bounded weight_tangent(tangents.weights[l]);
    const Numbers& bias_tangent = tangents.biases[l];
    const bool has_weight_tangent = !weight_tangent.value.empty();
    const auto product = [&](const BoundedMatrix& left,
                             const BoundedMatrix& right) {
      return product_reference(left, right, net.is_finite, rounding);
    };
    const BoundedMatrix delta(deltas[l], rows, out);
    Bounded z(std::size_t(rows * out)), more = z;
    result.of_weights.emplace_back(std::size_t(out * in));
    result.of_inputs.emplace_back(std::size_t(rows * in));
    if (tangent) {
      const BoundedMatrix of_rows(*tangent, rows, in);
      result.of_weights[l] = product(delta.transposed(), of_rows);
      z = product(of_rows, BoundedMatrix(weight, out, in).transposed());
    }
    if (has_weight_tangent) {
      const BoundedMatrix change(weight_tangent, out, in);
      result.of_inputs[l] = product(delta, change);
      more = product({input, rows, in}, change.transposed());
    }
    result.largest = std::max(result.largest, largest_of(z));
    for (std::size_t n = 0; n < z.value.size(); ++n) {
      const double bias = bias_tangent.empty() ? 0 : bias_tangent[n % out];
      more.value[n] += bias;
      more.round(n, std::abs(bias), rounding.of_sum(in), rounding);
      z.value[n] += more.value[n];
      z.error[n] += more.error[n];
      z.round(n, 0, 0, rounding);
    }
    result.largest =
        std::max({result.largest, largest_of(more), largest_of(z)});
    if (l + 1 < layers) {
      mask(z, a[l + 1]);
    }
    if (tangent || has_weight_tangent || !bias_tangent.empty()) {
      tangent = std::move(z);
    }
  }
  if (!tangent) {
    return result;
  }
  const Numbers& y = a.back();
  result.of_grad_output =
      activation_backward_reference(net, *tangent, y, rounding);
  with_row(net.activation, [&]<typename Row>() {
    if constexpr (Row::has_curvature) {
      for (std::size_t n = 0; n < y.size(); ++n) {
        const double change = tangent->value[n], error = tangent->error[n];
        const double curvature = Row::curvature(y[n]);
        const double slope = std::abs(net.grad[n] * curvature);
        result.of_y.value[n] = net.grad[n] * change * curvature;
        result.of_y.error[n] = slope * error;
        result.of_y.round(
            n, slope * (std::abs(change) + error), rounding.of_sum(0),
            rounding);
      }
    }
  });
  return result;
}

} // namespace relu_mlp::cpu
