// What the kernels of the narrow regime share: a network and a pass as their
// parameters, and the output activation with its derivative.
#pragma once

#include <cmath>

#include "../machine.h"
#include "fused.h"

namespace relu_mlp::cuda {

struct alignas(16) Float4 {
  float v[4];
};

template <typename T>
struct ForwardParameters {
  Narrow<T> network;
  NarrowForward<T> pass;
  NarrowLayout layout;
  int tile_rows;
};

template <typename T>
struct BackwardParameters {
  Narrow<T> network;
  NarrowBackward<T> pass;
  NarrowLayout layout;
  int64_t rows;
  bool recompute, recompute_y;
  int lowest; // the lowest layer with a gradient to compute
  int tile_rows;
  int sum_floats; // of all layers
  float* sums; // of block b at sums + b * sum_floats
  double* squares; // of block b at squares[b]
};

// Whether delta is carried on to the input of layer l.
template <typename T>
RELU_MLP_DEVICE bool is_carried_through(const BackwardParameters<T>& p, int l) {
  return l > p.lowest || p.pass.grad_x != nullptr;
}

// Matrix's own functions are the host's.
template <typename T>
RELU_MLP_DEVICE T& element(const Matrix<T>& m, int64_t i, int64_t j) {
  return m.data[i * m.row_stride + j * m.col_stride];
}

// ReLU passes NaN on.
RELU_MLP_DEVICE float relu(float z) {
  return z <= 0.0f ? 0.0f : z;
}

// z = phi(z), several at once: the activation is looked at once.
template <int N>
RELU_MLP_DEVICE void activate(Activation phi, float (&z)[N]) {
  const auto each = [&](const auto& f) {
    RELU_MLP_UNROLL
    for (int i = 0; i < N; ++i) {
      z[i] = f(z[i]);
    }
  };
  if (phi == Activation::relu) {
    each([](float z) { return relu(z); });
  } else if (phi == Activation::sigmoid) {
    each([](float z) { return 1.0f / (1.0f + expf(-z)); });
  } else if (phi == Activation::tanh) {
    each([](float z) { return tanhf(z); });
  }
}

// grad = grad * phi'(z), with phi' in terms of y = phi(z). The order of the
// factors is PyTorch's, so that 0 * inf turns up in the same places.
template <int N>
RELU_MLP_DEVICE void times_derivative(
    Activation phi,
    float (&grad)[N],
    const float (&y)[N]) {
  const auto each = [&](const auto& f) {
    RELU_MLP_UNROLL
    for (int i = 0; i < N; ++i) {
      grad[i] = f(grad[i], y[i]);
    }
  };
  if (phi == Activation::relu) {
    each([](float grad, float y) { return y <= 0.0f ? 0.0f : grad; });
  } else if (phi == Activation::sigmoid) {
    each([](float grad, float y) { return grad * (1.0f - y) * y; });
  } else if (phi == Activation::tanh) {
    each([](float grad, float y) { return grad * (1.0f - y * y); });
  }
}

// The sum of one double of every thread of the block, by thread 0, in a fixed
// order; `scratch` has room for a double of each warp.
RELU_MLP_DEVICE void sum_over_block(
    double value,
    double* scratch,
    double* result) {
  RELU_MLP_UNROLL
  for (int mask = warp_size / 2; mask > 0; mask /= 2) {
    value += shuffle_xor(value, mask);
  }
  sync(); // what was in the scratch has been read
  if (lane_index() == 0) {
    scratch[warp_index()] = value;
  }
  sync();
  if (thread_index() == 0) {
    double sum = 0;
    for (int warp = 0; warp < block_size() / warp_size; ++warp) {
      sum += scratch[warp];
    }
    *result = sum;
  }
}

} // namespace relu_mlp::cuda
