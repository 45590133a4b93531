// The narrow regime: all widths up to 128. One kernel for the whole forward
// pass and one, with a small one behind it, for the whole backward pass; a
// block of rows stays in registers and shared memory through all layers. Plain
// data, no PyTorch.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../../mlp.h"
#include "fused_plan.h"

namespace relu_mlp::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// The network. Weights are (out, in), contiguous; a null bias is missing.
// widths are those of x, the hidden activations and y. The backward pass asks
// only for the weights that delta passes through, and all if it recomputes.
template <typename T>
struct Narrow {
  int layers;
  int widths[max_layers + 1];
  const T* weights[max_layers];
  const T* biases[max_layers];
  Activation output_activation;
};

// hidden[l] is the output of layer l, (rows, widths[l + 1]), for
// l < layers - 1; null where it is not kept. y is (rows, widths[layers]). Both
// are contiguous.
template <typename T>
struct NarrowForward {
  Matrix<const T> x;
  T* hidden[max_layers];
  T* y;
};

// The gradients of sum(grad_output * y) or, where squares is not null, those of
// loss_scale * sum (y - target)^2; then that sum goes to *squares, on the
// device, x gives the number of rows, and grad_output is not read. A gradient
// that is null is not wanted. If what is needed of hidden and y is null it is
// computed from x. y, target, hidden and the gradients are contiguous.
template <typename T>
struct NarrowBackward {
  Matrix<const T> x;
  const T* hidden[max_layers]; // as in NarrowForward
  const T* y;
  Matrix<const T> grad_output;
  const T* target;
  double loss_scale;
  double* squares;
  T* grad_x;
  T* grad_weights[max_layers];
  T* grad_biases[max_layers];
};

// T is float, BFloat16 or Half. The call has to be one that narrow_serves on
// the current device, which is that of the stream.
template <typename T>
void narrow_forward(
    const Narrow<T>& network,
    const NarrowForward<T>& pass,
    Stream stream);

// `workspace` has narrow_workspace bytes, is aligned to 16 bytes, and is not
// initialized.
template <typename T>
void narrow_backward(
    const Narrow<T>& network,
    const NarrowBackward<T>& pass,
    void* workspace,
    Stream stream);

// The bytes of workspace of a backward pass, recomputing or not. They do not
// grow with the rows once there is work for every multiprocessor.
template <typename T>
int64_t narrow_workspace(
    const Narrow<T>& network,
    int64_t rows,
    const Device& device);

} // namespace relu_mlp::cuda
