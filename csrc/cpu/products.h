// The three matrix products of a linear layer and the sum over rows. A product
// is served by the small kernels or by PyTorch's own; which, depends on its
// sizes and strides alone.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

#include "../tensor.h"
#include "elementwise.h"
#include "small.h"

namespace relu_mlp::cpu {

// A product through PyTorch costs one to three microseconds before the first
// multiplication; the small kernels start at once but reach a fraction of the
// library's rate. docs/architecture.md has the measurement.
constexpr int64_t max_small_multiplications = 8192;

// Whether the small kernels may serve a product of these sizes whose operand
// `row_operand` they read row by row.
template <typename T>
bool is_small(
    int64_t rows,
    int64_t in_features,
    int64_t out_features,
    const Matrix<T>& row_operand) {
  constexpr int64_t limit = max_small_multiplications;
  // No overflow: a factor above the limit ends the test before the next one.
  return (std::is_same_v<T, const float> || std::is_same_v<T, const double>) &&
      row_operand.col_stride == 1 && rows <= limit && in_features <= limit &&
      out_features <= limit && rows * in_features <= limit &&
      rows * in_features * out_features <= limit;
}

// out (rows, out_features) = a (rows, in_features) weight^T + bias
template <typename T>
void linear(
    const Tensor& out,
    const Tensor& a,
    const Tensor& weight,
    const Tensor* bias) {
  const auto w = matrix<const T>(weight);
  const auto rows = matrix<const T>(a);
  if (rows.col_stride == 1 && is_small(rows.rows, w.cols, w.rows, w) &&
      (!bias || bias->is_contiguous())) {
    small_linear<T>(
        matrix<T>(out), rows, w, bias ? bias->data<const T>() : nullptr);
    return;
  }
  const Tensor weight_t = transposed(weight);
  if (bias) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(
        out.get(), bias->get(), a.get(), weight_t.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_mm_out(out.get(), a.get(), weight_t.get()));
  }
}

// out (out_features, in_features) = delta^T (out_features, rows) a (rows,
// in_features)
template <typename T>
void grad_weight(const Tensor& out, const Tensor& delta, const Tensor& a) {
  const auto d = matrix<const T>(delta);
  const auto input = matrix<const T>(a);
  if (is_small(d.rows, input.cols, d.cols, input)) {
    small_product<T>(matrix<T>(out), d.transposed(), input);
    return;
  }
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_mm_out(out.get(), transposed(delta).get(), a.get()));
}

// out (rows, in_features) = delta (rows, out_features) weight (out_features,
// in_features)
template <typename T>
void grad_input(const Tensor& out, const Tensor& delta, const Tensor& weight) {
  const auto d = matrix<const T>(delta);
  const auto w = matrix<const T>(weight);
  if (is_small(d.rows, w.cols, d.cols, w)) {
    small_product<T>(matrix<T>(out), d, w);
    return;
  }
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_mm_out(out.get(), delta.get(), weight.get()));
}

// out (features) = the sum of delta (rows, features) over its rows, in double
// precision. Every block of rows has a sum of its own, and the sums are added
// up in the order of the blocks, so the result does not depend on the number
// of threads.
template <typename T>
void grad_bias(const Tensor& out, const Tensor& delta) {
  constexpr int64_t block = 1024, blocks_per_task = 32;
  const auto d = matrix<const T>(delta);
  const int64_t blocks = std::max<int64_t>(1, (d.rows + block - 1) / block);
  std::vector<double> sums(blocks * d.cols);
  parallel_for(blocks, blocks_per_task, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      column_sums(
          sums.data() + b * d.cols, d, b * block,
          std::min(d.rows, (b + 1) * block));
    }
  });
  T* const result = out.data<T>();
  for (int64_t j = 0; j < d.cols; ++j) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      sum += sums[b * d.cols + j];
    }
    result[j] = T(compute_t<T>(sum));
  }
}

} // namespace relu_mlp::cpu
