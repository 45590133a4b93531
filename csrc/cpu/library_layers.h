// A network's layers by PyTorch's own products, which for wide layers run at
// the machine's limit, in 16-bit formats on its matrix units. What surrounds a
// product is done here, while the block is in the cache.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../parallel.h"
#include "../tensor.h"
#include "buffer.h"
#include "convert.h"
#include "network.h"
#include "plan.h"

namespace relu_mlp::cpu {

template <typename T>
class LibraryLayers {
  static constexpr bool is_narrow = !std::is_same_v<T, compute_t<T>>;

 public:
  using Element = T;
  using Sum = T;
  static constexpr bool takes_any_strides = true;

  LibraryLayers(const Network<T>& network, const Strategy&, Uses)
      : layers_(network.layers) {}

  // out = a W_l^T + b_l, then ReLU if asked for. In a 16-bit format the library
  // adds the bias, before it rounds.
  void linear(std::size_t l, Matrix<T> out, Matrix<const T> a, bool relu)
      const {
    const auto& [weight, bias] = layers_[l];
    const Tensor result = view(out), left = view(a);
    const Tensor right = view(weight.transposed());
    if (is_narrow && bias) {
      check_call(aoti_torch_cpu_addmm_out(
          result.get(), view(contiguous(bias, 1, out.cols)).get(), left.get(),
          right.get(), 1.0, 1.0));
    } else {
      check_call(
          aoti_torch_cpu_mm_out(result.get(), left.get(), right.get()));
    }
    if (relu || (bias && !is_narrow)) {
      each_rows(out, [&](Matrix<T> part) {
        if constexpr (is_narrow) {
          format<T>().relu(bits(part.data), part.rows * part.cols);
        } else {
          chosen_kernels<T>().bias_relu(part, bias, relu);
        }
      });
    }
  }

  int64_t scratch_size(int64_t, int64_t) const {
    return 0;
  }

  // to = delta^T a, or to += delta^T a, which is not asked of a 16-bit format: the
  // strategy makes one block of all its rows, so that the library sums them.
  void grad_weight(
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
      check_call(
          aoti_torch_cpu_mm_out(sum.get(), left.get(), view(a).get()));
    }
  }

  // out = delta W_l where mask > 0 or NaN, else 0; without a mask everywhere.
  void grad_input(
      std::size_t l,
      Matrix<T> out,
      Matrix<const T> delta,
      Matrix<const T> mask) const {
    check_call(aoti_torch_cpu_mm_out(
        view(out).get(), view(delta).get(), view(layers_[l].weight).get()));
    if (mask.data) {
      each_rows(out, [&](Matrix<T> part) {
        const T* const a = mask.data + (part.data - out.data);
        const int64_t count = part.rows * part.cols;
        if constexpr (is_narrow) {
          format<T>().mask(bits(part.data), bits(a), count);
        } else {
          chosen_kernels<T>().mask(part.data, a, count);
        }
      });
    }
  }

  // sums[j] += the sum of column j. Each column is summed by one thread.
  void column_sums(double* sums, Matrix<const T> delta) const {
    constexpr int64_t cols_at_once = 64;
    parallel_for(
        ceil_div(delta.cols, cols_at_once),
        std::max<int64_t>(1, grain / std::max<int64_t>(1, delta.rows * cols_at_once)),
        [&](int64_t first, int64_t last) {
          for (int64_t p = first; p < last; ++p) {
            const int64_t col = p * cols_at_once;
            Matrix<const T> part = delta;
            part.data += col * delta.col_stride;
            part.cols = std::min(cols_at_once, delta.cols - col);
            if constexpr (is_narrow) {
              add_columns(sums + col, part);
            } else {
              chosen_kernels<T>().column_sums(sums + col, part);
            }
          }
        });
  }

 private:
  static constexpr int64_t grain = 32768; // elements of a task

  // Calls f for parts of the rows of m, which is contiguous.
  template <typename U, typename F>
  static void each_rows(Matrix<U> m, const F& f) {
    parallel_for(
        m.rows, ceil_div(grain, std::max<int64_t>(1, m.cols)),
        [&](int64_t begin, int64_t end) { f(rows_of(m, begin, end - begin)); });
  }

  // The sums of at most 64 columns of a 16-bit format.
  static void add_columns(double* sums, Matrix<const T> m) {
    if (m.col_stride == 1) {
      format<T>().column_sums(
          sums, {bits(m.data), m.rows, m.cols, m.row_stride, 1});
      return;
    }
    for (int64_t i = 0; i < m.rows; ++i) {
      for (int64_t j = 0; j < m.cols; ++j) {
        sums[j] += double(float(m.at(i, j)));
      }
    }
  }

  // The memory as a tensor, for the time of a call.
  template <typename U>
  static Tensor view(Matrix<U> m) {
    const int64_t sizes[] = {m.rows, m.cols};
    const int64_t strides[] = {m.row_stride, m.col_stride};
    AtenTensorHandle handle;
    check_call(aoti_torch_create_tensor_from_blob(
        const_cast<std::remove_const_t<U>*>(m.data), 2, sizes, strides, 0,
        dtype_number<std::remove_const_t<U>>(), aoti_torch_device_type_cpu(),
        0, &handle));
    return Tensor(handle);
  }

  const std::vector<Layer<T>>& layers_;
};

} // namespace relu_mlp::cpu
