// The kernels between the products of a layered pass. Each function enqueues
// its kernels on a stream of the current device and returns.
//
// T is float, double, BFloat16 or Half. Matrices given by a pointer are
// contiguous and start at an address divisible by 16.
#pragma once

#include "../../mlp.h"
#include "../plan.h"

namespace relu_mlp::cuda {

// z = phi(z) for `count` elements, for activations that PyTorch does not apply
// (AppliedBy).
template <typename T>
void apply_activation(Activation phi, T* z, int64_t count, Stream stream);

// The result of summing delta over its rows. `total` has `cols` elements, or is
// null if the sums are not needed. `workspace` has reduction_workspace(...)
// bytes.
template <typename T>
struct ColumnSums {
  T* total;
  void* workspace;
};

// The largest workspace in bytes that a function below needs.
int64_t reduction_workspace(
    int64_t rows,
    int64_t cols,
    const DeviceProperties& device);

// delta = delta where a > 0 or is NaN, else 0, in place; and its column sums.
// delta and a are (rows, cols). The rows of a are contiguous, with any row
// stride.
template <typename T>
void mask_delta(
    T* delta,
    const Matrix<const T>& a,
    const ColumnSums<T>& sums,
    Stream stream);

// delta_L = grad_output * phi'(z_L), (rows, cols), and its column sums. `delta`
// may be null if only the sums are needed. `y` is null if phi is the identity.
template <typename T>
void output_delta(
    Activation phi,
    T* delta,
    const Matrix<const T>& grad_output,
    const T* y,
    const ColumnSums<T>& sums,
    Stream stream);

// delta_L = 2 scale (y - target) phi'(z_L) and its column sums, and *loss =
// scale * sum of (y - target)^2. All matrices are (rows, cols).
template <typename T>
void loss_delta(
    Activation phi,
    T* delta,
    const T* y,
    const T* target,
    int64_t rows,
    int64_t cols,
    double scale,
    T* loss,
    const ColumnSums<T>& sums,
    Stream stream);

// *loss = scale * *squares. Another kernel has summed the squares.
template <typename T>
void write_loss(T* loss, const double* squares, double scale, Stream stream);

} // namespace relu_mlp::cuda
