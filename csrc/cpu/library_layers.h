// The layers of a network with PyTorch's own products. For large layers these
// run at the machine's limit; in 16-bit formats they use its matrix units.
// Bias, ReLU, masks and column sums are computed here, while the block is in
// the cache.
//
// Activations, deltas and weight gradients have the tensors' type T.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../parallel.h"
#include "../tensor.h"
#include "buffer.h"
#include "convert.h"
#include "layers.h"

namespace relu_mlp::cpu {

template <typename T>
class LibraryLayers {
 public:
  using Element = T;
  using Sum = T;
  static constexpr bool takes_any_strides = true;

  template <typename ProductNeeds>
  LibraryLayers(const Network<T>& network, const Plan& plan, ProductNeeds)
      : layers_(network.layers), grain_(plan.tuning->elements_per_task) {}

  // In a 16-bit format the library adds the bias, before it rounds.
  void forward(std::size_t l, Matrix<T> z, Matrix<const T> a, bool relu) const {
    const Matrix<const T> weight = layers_[l].weight;
    // Not a structured binding, which Clang 14 cannot capture.
    const T* const bias = layers_[l].bias;
    const Tensor result = view(z), left = view(a);
    const Tensor right = view(weight.transposed());
    if (is_16bit<T> && bias) {
      check_call(aoti_torch_cpu_addmm_out(
          result.get(), view(contiguous(bias, 1, z.cols)).get(), left.get(),
          right.get(), 1.0, 1.0));
    } else {
      check_call(aoti_torch_cpu_mm_out(result.get(), left.get(), right.get()));
    }
    if (relu || (bias && !is_16bit<T>)) {
      for_each_row_range(z, [&](Matrix<T> part) {
        if constexpr (is_16bit<T>) {
          kernels16<T>().relu(bits(part.data), part.rows * part.cols);
        } else {
          chosen_kernels<T>().bias_relu(part, bias, relu);
        }
      });
    }
  }

  int64_t scratch_size(int64_t, int64_t) const {
    return 0;
  }

  // `add` is never set in a 16-bit format. The plan makes one block of all
  // rows, and the library computes the whole sum.
  void grad_weight(
      std::size_t,
      Matrix<T> to,
      Matrix<const T> delta,
      Matrix<const T> a,
      bool add,
      T*) const {
    const Tensor sum = view(to), left = view(delta.transposed());
    if (add) {
      check_call(aoti_torch_cpu_addmm_out(
          sum.get(), sum.get(), left.get(), view(a).get(), 1.0, 1.0));
    } else {
      check_call(aoti_torch_cpu_mm_out(sum.get(), left.get(), view(a).get()));
    }
  }

  void grad_input(
      std::size_t l,
      Matrix<T> out,
      Matrix<const T> delta,
      Matrix<const T> mask) const {
    check_call(aoti_torch_cpu_mm_out(
        view(out).get(), view(delta).get(), view(layers_[l].weight).get()));
    if (mask.data) {
      for_each_row_range(out, [&](Matrix<T> part) {
        const T* const a = mask.data + (part.data - out.data);
        const int64_t count = part.rows * part.cols;
        if constexpr (is_16bit<T>) {
          kernels16<T>().mask(bits(part.data), bits(a), count);
        } else {
          chosen_kernels<T>().mask(part.data, a, count);
        }
      });
    }
  }

  // One thread sums each column.
  void grad_bias(double* sums, Matrix<const T> delta) const {
    constexpr int64_t cols_at_once = 64; // the limit of Kernels16
    parallel_for(
        ceil_div(delta.cols, cols_at_once),
        std::max<int64_t>(
            1, grain_ / std::max<int64_t>(1, delta.rows * cols_at_once)),
        [&](int64_t first, int64_t last) {
          for (int64_t p = first; p < last; ++p) {
            const int64_t col = p * cols_at_once;
            Matrix<const T> part = delta;
            part.data += col * delta.col_stride;
            part.cols = std::min(cols_at_once, delta.cols - col);
            if constexpr (is_16bit<T>) {
              add_columns(sums + col, part);
            } else {
              chosen_kernels<T>().column_sums(sums + col, part);
            }
          }
        });
  }

 private:
  // Calls f for parts of the rows of m, which is contiguous.
  template <typename U, typename F>
  void for_each_row_range(Matrix<U> m, const F& f) const {
    parallel_for(
        m.rows, ceil_div(grain_, std::max<int64_t>(1, m.cols)),
        [&](int64_t begin, int64_t end) { f(rows_of(m, begin, end - begin)); });
  }

  // Adds the sums of at most 64 columns of a 16-bit format.
  static void add_columns(double* sums, Matrix<const T> m) {
    if (m.col_stride == 1) {
      kernels16<T>().column_sums(
          sums, {bits(m.data), m.rows, m.cols, m.row_stride, 1});
      return;
    }
    for (int64_t i = 0; i < m.rows; ++i) {
      for (int64_t j = 0; j < m.cols; ++j) {
        sums[j] += double(float(m.at(i, j)));
      }
    }
  }

  // A temporary tensor over the memory of m.
  template <typename U>
  static Tensor view(Matrix<U> m) {
    return from_blob<std::remove_const_t<U>, 2>(
        m.data, {m.rows, m.cols}, {m.row_stride, m.col_stride},
        aoti_torch_device_type_cpu(), 0);
  }

  const std::vector<Layer<T>>& layers_;
  const int64_t grain_; // elements of a task
};

} // namespace relu_mlp::cpu
