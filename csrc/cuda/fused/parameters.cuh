// Shared by the fused kernels: their parameters, and the output activation with
// its derivative.
#pragma once

#include "../machine.h"
#include "fused.h"

namespace relu_mlp::cuda {

struct alignas(16) Float4 {
  float v[4];
};

template <typename T>
struct ForwardParameters {
  FusedNetwork<T> network;
  FusedForward<T> pass;
  FusedLayout layout;
  int tile_rows;
};

template <typename T>
struct BackwardParameters {
  FusedNetwork<T> network;
  FusedBackward<T> pass;
  FusedLayout layout;
  bool recompute_y;
  int tile_rows;
  int sum_floats; // of all layers
  float* sums; // block b at sums + b * sum_floats
  double* squares; // block b at squares[b]
};

// Whether delta is propagated to the input of layer l.
template <typename T>
RELU_MLP_DEVICE bool propagates_through(const BackwardParameters<T>& p, int l) {
  return l > p.pass.lowest || p.pass.grad_x != nullptr;
}

// The member functions of Matrix are for the host only.
template <typename T>
RELU_MLP_DEVICE T& element(const Matrix<T>& m, int64_t i, int64_t j) {
  return m.data[i * m.row_stride + j * m.col_stride];
}

// z = phi(z) for N elements, with one switch over the activations.
template <int N>
RELU_MLP_DEVICE void activate(Activation phi, float (&z)[N]) {
  with_row(phi, [&]<typename Row>() {
    RELU_MLP_UNROLL
    for (int i = 0; i < N; ++i) {
      z[i] = Row::forward(z[i]);
    }
  });
}

// grad = grad * phi'(z), with phi' in terms of y = phi(z).
template <int N>
RELU_MLP_DEVICE void activation_backward(
    Activation phi,
    float (&grad)[N],
    const float (&y)[N]) {
  with_row(phi, [&]<typename Row>() {
    RELU_MLP_UNROLL
    for (int i = 0; i < N; ++i) {
      grad[i] = Row::backward(grad[i], y[i]);
    }
  });
}

// Sums one double of every thread of the block, in a fixed order. Thread 0
// writes the result. `scratch` holds one double for each warp.
RELU_MLP_DEVICE void sum_over_block(
    double value,
    double* scratch,
    double* result) {
  RELU_MLP_UNROLL
  for (int mask = warp_size / 2; mask > 0; mask /= 2) {
    value += shuffle_xor(value, mask);
  }
  sync(); // the scratch may be overwritten
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
