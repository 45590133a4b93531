// The tensor operations that the operators need, on LibTorch's stable ABI.
//
// torch::stable::Tensor would work, but it shares ownership: it costs two more
// allocations for every argument and every result. For small sizes these take
// longer than the arithmetic. A Tensor here has one owner.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "error.h"
#include "mlp.h"

namespace relu_mlp {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// PyTorch's number for the dtype of T.
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

  // A request for a mutable pointer makes PyTorch materialize a lazy copy
  // (torch._lazy_clone). A const T therefore requests a const pointer.
  template <typename T>
  T* data() const {
    std::conditional_t<std::is_const_v<T>, const void*, void*> pointer;
    if constexpr (std::is_const_v<T>) {
      pointer = ask(torch_get_const_data_ptr);
    } else {
      pointer = ask(torch_get_mutable_data_ptr);
    }
    if (!pointer && numel() > 0) {
      fail("a tensor has elements, but no memory");
    }
    return static_cast<T*>(pointer);
  }
  int64_t dim() const {
    return ask(aoti_torch_get_dim);
  }
  int64_t numel() const {
    return ask(aoti_torch_get_numel);
  }
  // Each has dim() entries and belongs to the tensor.
  const int64_t* sizes() const {
    return ask(aoti_torch_get_sizes);
  }
  const int64_t* strides() const {
    return ask(aoti_torch_get_strides);
  }
  int64_t size(int64_t d) const {
    return sizes()[d];
  }
  int64_t storage_offset() const { // in elements
    return ask(aoti_torch_get_storage_offset);
  }
  int64_t storage_size() const { // in bytes
    return ask(aoti_torch_get_storage_size);
  }
  bool is_contiguous() const {
    return ask(aoti_torch_is_contiguous);
  }
  // A dtype number such as aoti_torch_dtype_float32() returns.
  int32_t dtype() const {
    return ask(aoti_torch_get_dtype);
  }
  int32_t device_type() const {
    return ask(aoti_torch_get_device_type);
  }
  int32_t device_index() const {
    return ask(aoti_torch_get_device_index);
  }

 private:
  // Returns the value that a getter of PyTorch's C interface writes to its last
  // argument.
  template <typename Value>
  Value ask(AOTITorchError (*getter)(AtenTensorHandle, Value*)) const {
    Value value;
    check_call(getter(handle_, &value));
    return value;
  }

  AtenTensorHandle handle_ = nullptr;
};

// Whether the storage has memory for all elements of the tensor. resize_ may
// have freed or shrunk the storage while the tensor kept its sizes.
inline bool storage_covers(const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  const int64_t *sizes = tensor.sizes(), *strides = tensor.strides();
  // The number of elements from the tensor's first one to the end of the
  // storage. The loop compares quotients because products could overflow.
  const int64_t bytes = int64_t(aoti_torch_dtype_element_size(tensor.dtype()));
  int64_t left = tensor.storage_size() / bytes - tensor.storage_offset();
  bool is_within = true;
  for (int64_t d = 0; d < dim; ++d) {
    const int64_t steps = sizes[d] - 1, stride = strides[d];
    if (steps < 0) {
      return true; // a tensor without elements is never read
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

// Throws the reason why a new tensor of these sizes could not be created.
[[noreturn]] inline void fail_to_create(
    const std::vector<int64_t>& sizes,
    const Tensor& like) {
  fail_with_reason();
  double bytes = double(aoti_torch_dtype_element_size(like.dtype()));
  for (const int64_t size : sizes) {
    bytes *= double(size);
  }
  if (like.device_type() == aoti_torch_device_type_cuda()) {
    fail(
        "CUDA out of memory. Tried to allocate ", std::fixed,
        std::setprecision(0), bytes, " bytes.");
  }
  fail_to_allocate(bytes);
}

// A new contiguous tensor with the dtype and device of `like`, not initialized.
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

// A view of the tensor's memory with other sizes and strides, made without the
// dispatcher. The shim adds its offset argument, here 0, to the tensor's own
// offset.
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

// A tensor over memory that the caller owns. dtype_number must know T.
template <typename T, std::size_t N>
Tensor from_blob(
    const T* data,
    const std::array<int64_t, N>& sizes,
    const std::array<int64_t, N>& strides,
    int32_t device_type,
    int32_t device_index) {
  AtenTensorHandle handle;
  check_call(aoti_torch_create_tensor_from_blob(
      const_cast<T*>(data), N, sizes.data(), strides.data(), 0,
      dtype_number<T>(), device_type, device_index, &handle));
  return Tensor(handle);
}

// The tensor itself if it is contiguous, else a copy, which `holder` keeps.
inline const Tensor& as_contiguous(const Tensor& tensor, Tensor& holder) {
  if (tensor.is_contiguous()) {
    return tensor;
  }
  AtenTensorHandle argument;
  check_call(aoti_torch_new_tensor_handle(tensor.get(), &argument));
  std::array<StableIValue, 2> stack{
      torch::stable::detail::from(argument),
      torch::stable::detail::from(
          aoti_torch_memory_format_contiguous_format())};
  check_call(torch_call_dispatcher(
      "aten::contiguous", "", stack.data(), TORCH_ABI_VERSION));
  holder = Tensor(torch::stable::detail::to<AtenTensorHandle>(stack[0]));
  return holder;
}

// (*, features) as (rows, features). Returns the tensor itself if it is a
// matrix, else a view, or a copy if no view is possible. `holder` owns the view
// or the copy.
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

// A 2-D tensor as plain data. With at most one column the column stride is
// irrelevant, and the kernels expect 1.
template <typename T>
Matrix<T> matrix(const Tensor& tensor) {
  const int64_t *sizes = tensor.sizes(), *strides = tensor.strides();
  return {
      tensor.data<T>(), sizes[0], sizes[1], strides[0],
      sizes[1] <= 1 ? 1 : strides[1]};
}

// Calls f<T>() with the C++ type of `dtype`.
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
