// The fused passes, for widths up to 128. One kernel computes the whole forward
// pass. One kernel, followed by a small one that adds up its sums, computes the
// whole backward pass. A block of rows stays in registers and shared memory
// through all layers. The passes work on plain data, without PyTorch.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../../mlp.h"
#include "fused_plan.h"

namespace relu_mlp::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// The network as a kernel parameter. Weights are (out, in), contiguous. A null
// bias is missing. `widths` has the widths of x, the hidden activations and y.
// The backward pass reads only the weights through which delta is propagated,
// or all weights if it recomputes.
template <typename T>
struct FusedNetwork {
  int layers;
  int widths[max_layers + 1];
  const T* weights[max_layers];
  const T* biases[max_layers];
  Activation output_activation;
};

// hidden[l] is the output of layer l, (rows, widths[l + 1]), for l < layers -
// 1, or null if it is not saved. y is (rows, widths[layers]). Both are
// contiguous.
template <typename T>
struct FusedForward {
  Matrix<const T> x;
  T* hidden[max_layers];
  T* y;
};

// The gradients of sum(grad_output * y) if `squares` is null. Otherwise the
// gradients of loss_scale * sum (y - target)^2: the kernel writes that sum to
// *squares, on the device, and does not read grad_output. A null gradient is
// not needed. With `recompute`, y and the hidden activations are computed from
// x. y, target, hidden and the gradients are contiguous.
template <typename T>
struct FusedBackward {
  int64_t rows;
  int lowest; // the lowest layer with a gradient to compute
  bool recompute;
  Matrix<const T> x;
  const T* hidden[max_layers]; // as in FusedForward
  const T* y;
  Matrix<const T> grad_output;
  const T* target;
  double loss_scale;
  double* squares;
  T* grad_x;
  T* grad_weights[max_layers];
  T* grad_biases[max_layers];
};

// T is float, BFloat16 or Half. The plan is the plan of this pass on the
// current device. The stream is a stream of that device.
template <typename T>
void fused_forward(
    const FusedNetwork<T>& network,
    const FusedForward<T>& pass,
    const FusedPlan& plan,
    Stream stream);

// `workspace` has fused_workspace_bytes(plan), is aligned to 16 bytes, and is
// not initialized.
template <typename T>
void fused_backward(
    const FusedNetwork<T>& network,
    const FusedBackward<T>& pass,
    const FusedPlan& plan,
    void* workspace,
    Stream stream);

} // namespace relu_mlp::cuda
