// The few things the operators need of a tensor, on LibTorch's stable ABI.
//
// torch::stable::Tensor would do, but it shares ownership: every argument and
// every result costs two more allocations, which at small sizes take longer
// than the arithmetic. Here a tensor has one owner.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "error.h"
#include "mlp.h"

namespace relu_mlp {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) {
      aoti_torch_delete_tensor_object(handle_);
    }
  }

  AtenTensorHandle get() const {
    return handle_;
  }
  AtenTensorHandle release() {
    return std::exchange(handle_, nullptr);
  }

  template <typename T>
  T* data() const {
    void* pointer;
    check_call(aoti_torch_get_data_ptr(handle_, &pointer));
    if (!pointer && numel() > 0) {
      fail("a tensor has elements, but no memory");
    }
    return static_cast<T*>(pointer);
  }
  int64_t dim() const {
    int64_t dim;
    check_call(aoti_torch_get_dim(handle_, &dim));
    return dim;
  }
  int64_t numel() const {
    int64_t numel;
    check_call(aoti_torch_get_numel(handle_, &numel));
    return numel;
  }
  // dim() numbers each; the tensor's own memory.
  const int64_t* sizes() const {
    int64_t* sizes;
    check_call(aoti_torch_get_sizes(handle_, &sizes));
    return sizes;
  }
  const int64_t* strides() const {
    int64_t* strides;
    check_call(aoti_torch_get_strides(handle_, &strides));
    return strides;
  }
  int64_t size(int64_t d) const {
    return sizes()[d];
  }
  // In elements.
  int64_t storage_offset() const {
    int64_t offset;
    check_call(aoti_torch_get_storage_offset(handle_, &offset));
    return offset;
  }
  // In bytes.
  int64_t storage_size() const {
    int64_t bytes;
    check_call(aoti_torch_get_storage_size(handle_, &bytes));
    return bytes;
  }
  bool is_contiguous() const {
    bool is_contiguous;
    check_call(
        aoti_torch_is_contiguous(handle_, &is_contiguous));
    return is_contiguous;
  }
  // One of the numbers that aoti_torch_dtype_float32() and its like return.
  int32_t dtype() const {
    int32_t dtype;
    check_call(aoti_torch_get_dtype(handle_, &dtype));
    return dtype;
  }
  int32_t device_type() const {
    int32_t type;
    check_call(aoti_torch_get_device_type(handle_, &type));
    return type;
  }
  int32_t device_index() const {
    int32_t index;
    check_call(aoti_torch_get_device_index(handle_, &index));
    return index;
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// Whether the storage has memory for all elements. It need not: resize_ frees or
// shrinks it under a tensor whose sizes stay what they were.
inline bool is_covered(const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  const int64_t *sizes = tensor.sizes(), *strides = tensor.strides();
  // Elements from the first of the tensor to the end of the storage. What is
  // compared are quotients: products could overflow.
  const int64_t bytes = int64_t(aoti_torch_dtype_element_size(tensor.dtype()));
  int64_t left = tensor.storage_size() / bytes - tensor.storage_offset();
  bool is_within = true;
  for (int64_t d = 0; d < dim; ++d) {
    const int64_t steps = sizes[d] - 1, stride = strides[d];
    if (steps < 0) {
      return true; // nothing is read of a tensor without elements
    }
    if (steps > 0 && stride > 0) {
      is_within = is_within && steps <= (stride == 1 ? left : left / stride);
      left -= is_within ? steps * stride : 0;
    }
  }
  return is_within && left > 0;
}

// The strides of a contiguous tensor.
template <typename Sizes>
Sizes contiguous_strides(const Sizes& sizes) {
  Sizes strides = sizes;
  int64_t stride = 1;
  for (std::size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  return strides;
}

// Throws the reason why there is no new tensor of these sizes like `like`.
[[noreturn]] inline void fail_to_create(
    const std::vector<int64_t>& sizes,
    const Tensor& like) {
  fail_with_reason();
  double bytes = double(aoti_torch_dtype_element_size(like.dtype()));
  for (const int64_t size : sizes) {
    bytes *= double(size);
  }
  if (like.device_type() == aoti_torch_device_type_cuda()) {
    fail("CUDA out of memory. Tried to allocate ", std::fixed,
         std::setprecision(0), bytes, " bytes.");
  }
  fail_to_allocate(bytes);
}

// A new tensor with the dtype and device of `like`, contiguous, not filled.
template <std::size_t N>
Tensor empty(const std::array<int64_t, N>& sizes, const Tensor& like) {
  const std::array<int64_t, N> strides = contiguous_strides(sizes);
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(
          N, sizes.data(), strides.data(), like.dtype(), like.device_type(),
          like.device_index(), &handle) != 0) {
    fail_to_create(std::vector<int64_t>(sizes.begin(), sizes.end()), like);
  }
  return Tensor(handle);
}

// The same memory under other sizes and strides, without a trip through the
// dispatcher. The last argument of the shim is added to the tensor's offset.
template <typename Sizes>
Tensor reinterpret(
    const Tensor& tensor,
    const Sizes& sizes,
    const Sizes& strides) {
  AtenTensorHandle handle;
  check_call(aoti_torch__reinterpret_tensor(
      tensor.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
      strides.data(), 0, &handle));
  return Tensor(handle);
}

inline Tensor transposed(const Tensor& matrix) {
  const int64_t *sizes = matrix.sizes(), *strides = matrix.strides();
  return reinterpret(
      matrix, std::array<int64_t, 2>{sizes[1], sizes[0]},
      std::array<int64_t, 2>{strides[1], strides[0]});
}

// The tensor itself if it is contiguous, else a copy, which `holder` keeps.
inline const Tensor& as_contiguous(const Tensor& tensor, Tensor& holder) {
  if (tensor.is_contiguous()) {
    return tensor;
  }
  AtenTensorHandle argument;
  check_call(
      aoti_torch_new_tensor_handle(tensor.get(), &argument));
  std::array<StableIValue, 2> stack{
      torch::stable::detail::from(argument),
      torch::stable::detail::from(
          aoti_torch_memory_format_contiguous_format())};
  check_call(torch_call_dispatcher(
      "aten::contiguous", "", stack.data(), TORCH_ABI_VERSION));
  holder =
      Tensor(torch::stable::detail::to<AtenTensorHandle>(stack[0]));
  return holder;
}

// (*, features) as (rows, features): the tensor itself if it is a matrix, else
// a view, and where no view will do a copy, which `holder` keeps.
inline const Tensor& as_matrix(const Tensor& tensor, Tensor& holder) {
  const int64_t dim = tensor.dim();
  if (dim == 2) {
    return tensor;
  }
  Tensor copy;
  const Tensor& source = as_contiguous(tensor, copy);
  const int64_t* sizes = source.sizes();
  std::array<int64_t, 2> shape{1, sizes[dim - 1]};
  for (int64_t d = 0; d + 1 < dim; ++d) {
    shape[0] *= sizes[d];
  }
  holder = reinterpret(source, shape, contiguous_strides(shape));
  return holder;
}

// The contiguous matrix (rows, cols) as (*, cols), where * are the leading
// sizes of `like`.
inline Tensor with_leading_sizes(Tensor matrix, const Tensor& like) {
  const int64_t dim = like.dim();
  if (dim == 2) {
    return matrix;
  }
  std::vector<int64_t> sizes(like.sizes(), like.sizes() + dim);
  sizes.back() = matrix.size(1);
  return reinterpret(matrix, sizes, contiguous_strides(sizes));
}

// A 2-D tensor as plain data. A size of 1 makes its stride irrelevant, and 1
// is the value that suits the kernels.
template <typename T>
Matrix<T> matrix(const Tensor& tensor) {
  const int64_t *sizes = tensor.sizes(), *strides = tensor.strides();
  return {
      tensor.data<T>(), sizes[0], sizes[1], strides[0],
      sizes[1] <= 1 ? 1 : strides[1]};
}

// The number of the dtype that T is stored as.
template <typename T>
int32_t dtype_number() {
  if constexpr (std::is_same_v<T, float>) {
    return aoti_torch_dtype_float32();
  } else if constexpr (std::is_same_v<T, double>) {
    return aoti_torch_dtype_float64();
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return aoti_torch_dtype_bfloat16();
  } else {
    return aoti_torch_dtype_float16();
  }
}

// Calls f<T>() with the C++ type that `dtype` stands for.
template <typename F>
auto dispatch(int32_t dtype, const F& f) {
  if (dtype == aoti_torch_dtype_float32()) {
    return f.template operator()<float>();
  } else if (dtype == aoti_torch_dtype_float64()) {
    return f.template operator()<double>();
  } else if (dtype == aoti_torch_dtype_bfloat16()) {
    return f.template operator()<BFloat16>();
  } else if (dtype == aoti_torch_dtype_float16()) {
    return f.template operator()<Half>();
  }
  fail("relu_mlp: no kernel for this dtype");
}

} // namespace relu_mlp
