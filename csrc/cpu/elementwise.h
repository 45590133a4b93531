// The parts of the mathematics that are not matrix products, on contiguous
// memory. Plain C++: no PyTorch beyond its number formats, no threads; the
// caller cuts the work into ranges. All of it is limited by memory bandwidth.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../mlp.h"

namespace relu_mlp::cpu {

// bfloat16 and float16 are stored, float32 is computed with.
template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// a = max(z, 0), in place; NaN passes, as in torch.relu.
template <typename T>
void relu(T* z, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    z[i] = z[i] <= T(0) ? T(0) : z[i];
  }
}

// delta = delta where a > 0 or a is NaN, else 0, in place. It selects and does
// not multiply, so an infinite gradient at a unit that is off gives 0.
template <typename T>
void relu_backward(T* delta, const T* a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    delta[i] = a[i] <= T(0) ? T(0) : delta[i];
  }
}

// grad * phi'(z), with phi' written in terms of y = phi(z). The order of the
// factors is PyTorch's, so that 0 * inf turns up in the same places.
template <Activation activation, typename C>
C times_derivative(C grad, C y) {
  if constexpr (activation == Activation::relu) {
    return y <= C(0) ? C(0) : grad;
  } else if constexpr (activation == Activation::sigmoid) {
    return grad * (C(1) - y) * y;
  } else if constexpr (activation == Activation::tanh) {
    return grad * (C(1) - y * y);
  } else {
    return grad;
  }
}

// delta = grad_output * phi'(z) for the rows [begin, end). delta and y are
// contiguous, grad_output has any strides.
template <Activation activation, typename T>
void activation_backward(
    T* delta,
    Matrix<const T> grad_output,
    const T* y,
    int64_t begin,
    int64_t end) {
  using C = compute_t<T>;
  const int64_t cols = grad_output.cols;
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      delta[i * cols + j] = T(times_derivative<activation>(
          C(grad_output.at(i, j)), C(y[i * cols + j])));
    }
  }
}

// For the elements [begin, end): delta = scale * (y - target) * phi'(z), which
// is the gradient of the loss at z. Returns the sum of (y - target)^2. delta
// may be y itself: each element is read before it is written.
template <Activation activation, typename T>
double squared_error(
    T* delta,
    const T* y,
    const T* target,
    double scale,
    int64_t begin,
    int64_t end) {
  using C = compute_t<T>;
  double sum = 0;
  for (int64_t i = begin; i < end; ++i) {
    const C output = C(y[i]);
    const C error = output - C(target[i]);
    sum += double(error) * double(error);
    delta[i] = T(times_derivative<activation>(C(scale) * error, output));
  }
  return sum;
}

// sums[j] += the sum of column j of m over the rows [begin, end), in double
// precision.
template <typename T>
void column_sums(
    double* sums,
    Matrix<const T> m,
    int64_t begin,
    int64_t end) {
  const bool contiguous_rows = m.col_stride == 1;
  for (int64_t i = begin; i < end; ++i) {
    const T* const row = m.row(i);
    if (contiguous_rows) { // a stride known here makes this vector code
      for (int64_t j = 0; j < m.cols; ++j) {
        sums[j] += double(row[j]);
      }
    } else {
      for (int64_t j = 0; j < m.cols; ++j) {
        sums[j] += double(row[j * m.col_stride]);
      }
    }
  }
}

} // namespace relu_mlp::cpu
