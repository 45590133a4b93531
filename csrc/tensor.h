// The few things the operators need of a tensor, on LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "mlp.h"

namespace relu_mlp {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws what Python sees as a RuntimeError whose text is the message alone.
// (STD_TORCH_CHECK would put the source file and line in front of it.)
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A new tensor with the dtype and device of `like`, contiguous, not filled.
template <std::size_t N>
Tensor empty(const std::array<int64_t, N>& sizes, const Tensor& like) {
  std::array<int64_t, N> strides;
  int64_t stride = 1;
  for (std::size_t d = N; d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  int32_t dtype, device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      N, sizes.data(), strides.data(), dtype, device_type, device_index,
      &handle));
  return Tensor(handle);
}

// The same memory under other sizes and strides, without a trip through the
// dispatcher.
inline Tensor reinterpret(
    const Tensor& tensor,
    const std::vector<int64_t>& sizes,
    const std::vector<int64_t>& strides) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      tensor.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
      strides.data(), tensor.storage_offset(), &handle));
  return Tensor(handle);
}

inline Tensor transposed(const Tensor& matrix) {
  return reinterpret(
      matrix, {matrix.size(1), matrix.size(0)},
      {matrix.stride(1), matrix.stride(0)});
}

// (*, features) as (rows, features); a copy only where no view will do.
inline Tensor as_matrix(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  if (sizes.size() == 2) {
    return tensor;
  }
  int64_t rows = 1;
  for (std::size_t d = 0; d + 1 < sizes.size(); ++d) {
    rows *= sizes[d];
  }
  const int64_t cols = sizes[sizes.size() - 1];
  if (tensor.is_contiguous()) {
    return reinterpret(tensor, {rows, cols}, {cols > 0 ? cols : 1, 1});
  }
  const std::array<int64_t, 2> shape{rows, cols};
  return torch::stable::reshape(tensor, shape);
}

// The contiguous matrix (rows, cols) as (*, cols), where * are the leading
// sizes of `like`.
inline Tensor with_leading_sizes(const Tensor& matrix, const Tensor& like) {
  const auto like_sizes = like.sizes();
  if (like_sizes.size() == 2) {
    return matrix;
  }
  std::vector<int64_t> sizes(like_sizes.begin(), like_sizes.end());
  sizes.back() = matrix.size(1);
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (std::size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  return reinterpret(matrix, sizes, strides);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A 2-D tensor as plain data. A size of 1 makes its stride irrelevant, and 1
// is the value that suits the kernels.
template <typename T>
Matrix<T> matrix(const Tensor& tensor) {
  const int64_t cols = tensor.size(1);
  return {
      static_cast<T*>(tensor.data_ptr()), tensor.size(0), cols,
      tensor.stride(0), cols <= 1 ? 1 : tensor.stride(1)};
}

// Calls f<T>() with the C++ type that `dtype` stands for.
template <typename F>
auto dispatch(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::BFloat16:
      return f.template operator()<BFloat16>();
    case ScalarType::Half:
      return f.template operator()<Half>();
    default:
      fail("relu_mlp: no kernel for this dtype");
  }
}

} // namespace relu_mlp
