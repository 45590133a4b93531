#include "kernels.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <stdexcept>

#include "column_reduction.cuh"

namespace relu_mlp::cuda {
namespace {

constexpr int activation_threads = 256;

template <typename T>
struct ActivationParameters {
  T* z;
  int64_t count;
};

// Memory bandwidth limits the speed: the kernel reads and writes 2 * count *
// sizeof(T) bytes in total. A thread handles 16 bytes, or a shorter remainder
// element by element.
template <typename T, typename Row>
RELU_MLP_KERNEL void RELU_MLP_BOUNDS(activation_threads)
    activation_kernel(RELU_MLP_PARAMETER ActivationParameters<T> p) {
  using C = compute_t<T>;
  constexpr int vector = 16 / sizeof(T);
  const int64_t first =
      (int64_t(block_index()) * activation_threads + thread_index()) * vector;
  if (first + vector <= p.count) {
    T z[vector];
    load(z, p.z + first);
    RELU_MLP_UNROLL
    for (int v = 0; v < vector; ++v) {
      z[v] = T(Row::forward(C(z[v])));
    }
    store(p.z + first, z);
  } else {
    for (int64_t i = first; i < p.count; ++i) {
      p.z[i] = T(Row::forward(C(p.z[i])));
    }
  }
}

template <typename T>
struct LossParameters {
  const double* parts;
  int64_t count;
  double scale;
  T* loss;
};

// One block. Every thread sums its share of the squares, then the block adds
// the sums of its threads.
template <typename T>
RELU_MLP_KERNEL void RELU_MLP_BOUNDS(reduction_threads)
    loss_kernel(RELU_MLP_PARAMETER LossParameters<T> p) {
  double sum = 0;
  for (int64_t i = thread_index(); i < p.count; i += reduction_threads) {
    sum += p.parts[i];
  }
  sum = block_sum(sum, reinterpret_cast<double*>(shared_memory()));
  if (thread_index() == 0) {
    *p.loss = T(compute_t<T>(p.scale * sum));
  }
}

template <typename T>
void launch_loss(const LossParameters<T>& squares, Stream stream) {
  launch(
      loss_kernel<T>,
      {1, reduction_threads, reduction_threads * int64_t(sizeof(double))},
      stream, squares);
}

} // namespace

int64_t reduction_workspace(
    int64_t rows,
    int64_t cols,
    const DeviceProperties& device) {
  int64_t elements = 0;
  for (const int vector : {1, 2, 4, 8}) {
    const ColumnReduction plan = plan_reduction(rows, cols, vector, device);
    elements = std::max<int64_t>(elements, plan.blocks() + plan.chunks * cols);
  }
  return elements * sizeof(double);
}

template <typename T>
void apply_activation(Activation phi, T* z, int64_t count, Stream stream) {
  constexpr int64_t block_elements = activation_threads * 16 / sizeof(T);
  if (count == 0) {
    return;
  }
  with_row(phi, [&]<typename Row>() {
    if constexpr (Row::applied_by == AppliedBy::pytorch) {
      throw std::logic_error("relu_mlp: PyTorch applies this activation");
    } else {
      launch(
          activation_kernel<T, Row>,
          {ceil_div(count, block_elements), activation_threads}, stream,
          ActivationParameters<T>{z, count});
    }
  });
}

template <typename T>
void mask_delta(
    T* delta,
    const Matrix<const T>& a,
    const ColumnSums<T>& sums,
    Stream stream) {
  constexpr int max_vector = 16 / sizeof(T);
  const MaskedDelta<T> source{delta, a};
  const bool aligned = reinterpret_cast<uintptr_t>(a.data) % 16 == 0;
  if (vector_length(a.cols, a.row_stride, sizeof(T), aligned) == max_vector) {
    compute_and_sum<T, max_vector>(
        source, delta, a.rows, a.cols, sums, false, stream);
  } else {
    compute_and_sum<T, 1>(source, delta, a.rows, a.cols, sums, false, stream);
  }
}

template <typename T>
void output_delta(
    Activation phi,
    T* delta,
    const Matrix<const T>& grad_output,
    const T* y,
    const ColumnSums<T>& sums,
    Stream stream) {
  compute_and_sum<T, 1>(
      OutputDelta<T>{phi, grad_output, y}, delta, grad_output.rows,
      grad_output.cols, sums, false, stream);
}

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
    Stream stream) {
  const ColumnReduction plan = compute_and_sum<T, 1>(
      LossDelta<T>{phi, y, target, cols, scale}, delta, rows, cols, sums, true,
      stream);
  launch_loss<T>(
      {static_cast<const double*>(sums.workspace), cols > 0 ? plan.blocks() : 0,
       scale, loss},
      stream);
}

template <typename T>
void write_loss(T* loss, const double* squares, double scale, Stream stream) {
  launch_loss<T>({squares, 1, scale, loss}, stream);
}

#define RELU_MLP_INSTANTIATE(T)                                               \
  template void apply_activation(Activation, T*, int64_t, Stream);            \
  template void mask_delta(                                                   \
      T*, const Matrix<const T>&, const ColumnSums<T>&, Stream);              \
  template void output_delta(                                                 \
      Activation, T*, const Matrix<const T>&, const T*, const ColumnSums<T>&, \
      Stream);                                                                \
  template void loss_delta(                                                   \
      Activation, T*, const T*, const T*, int64_t, int64_t, double, T*,       \
      const ColumnSums<T>&, Stream);                                          \
  template void write_loss(T*, const double*, double, Stream);

RELU_MLP_INSTANTIATE(float)
RELU_MLP_INSTANTIATE(double)
RELU_MLP_INSTANTIATE(torch::headeronly::BFloat16)
RELU_MLP_INSTANTIATE(torch::headeronly::Half)

} // namespace relu_mlp::cuda
