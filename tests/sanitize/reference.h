// A network in double precision, with a bound on the rounding error of every
// number (Higham's gamma_n, as in tests/support/bounds.py).
#pragma once

#include <algorithm>
#include <cmath>
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

struct Gradients {
  Bounded x;
  std::vector<Bounded> weights, biases;
  double largest; // the largest element of the gradients of rows
};

// The gradients for a gradient of y, given the activations that a forward pass
// has found: x, a_1 ... a_{L-1}, y.
inline Gradients backward_reference(
    const NetworkNumbers& net,
    const std::vector<Numbers>& a,
    const Numbers& grad,
    Rounding rounding) {
  Bounded delta(grad.size());
  for (std::size_t n = 0; n < grad.size(); ++n) {
    delta.value[n] = with_row(net.activation, [&]<typename Row>() {
      return Row::backward(grad[n], a.back()[n]);
    });
    const bool is_off = net.activation == Activation::relu && a.back()[n] <= 0;
    // |phi'| <= 1, and of_sum(0) covers the operations of any phi'.
    delta.round(
        n, is_off ? 0 : std::abs(grad[n]), rounding.of_sum(0), rounding);
  }
  Gradients result{Bounded(0), {}, {}, 0};
  const auto enter_largest = [&](const Numbers& numbers) {
    for (const double n : numbers) {
      result.largest = std::max(result.largest, std::abs(n));
    }
  };
  enter_largest(delta.value);
  for (std::size_t l = 0; l < net.layers(); ++l) {
    result.weights.emplace_back(net.weights[l].size());
    result.biases.emplace_back(std::size_t(net.sizes[l + 1]));
  }
  for (std::size_t l = net.layers(); l-- > 0;) {
    const int64_t in = net.sizes[l], out = net.sizes[l + 1];
    const double of_rows = rounding.of_sum(net.rows);
    const double of_out = rounding.of_sum(out);
    Bounded &weight = result.weights[l], &bias = result.biases[l];
    Bounded below(std::size_t(net.rows * in));
    for (int64_t r = 0; r < net.rows; ++r) {
      for (int64_t i = 0; i < out; ++i) {
        const double d = delta.value[r * out + i];
        const double e = delta.error[r * out + i];
        if (net.is_finite && d == 0 && e == 0) {
          continue; // adds nothing
        }
        bias.value[i] += d;
        bias.error[i] += e + of_rows * (std::abs(d) + e);
        for (int64_t j = 0; j < in; ++j) {
          const double left = a[l][r * in + j];
          weight.value[i * in + j] += d * left;
          weight.error[i * in + j] +=
              (e + of_rows * (std::abs(d) + e)) * std::abs(left);
          const double w = net.weights[l][i * in + j];
          below.value[r * in + j] += d * w;
          below.error[r * in + j] +=
              (e + of_out * (std::abs(d) + e)) * std::abs(w);
        }
      }
    }
    for (std::size_t n = 0; n < weight.value.size(); ++n) {
      weight.round(n, 0, 0, rounding);
    }
    for (std::size_t n = 0; n < bias.value.size(); ++n) {
      bias.round(n, 0, 0, rounding);
    }
    for (std::size_t n = 0; n < below.value.size(); ++n) {
      if (l > 0 && a[l][n] <= 0) {
        below.value[n] = below.error[n] = 0;
      } else {
        below.round(n, 0, 0, rounding);
      }
    }
    enter_largest(below.value);
    delta = std::move(below);
  }
  result.x = std::move(delta);
  return result;
}

} // namespace relu_mlp::cpu
