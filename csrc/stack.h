// Arguments from, and results to, the stack on which the dispatcher hands
// them over. A kernel owns what is on the stack when it is called and takes
// all of it before it does anything that can fail. (TORCH_BOX does this too,
// by way of torch::stable::Tensor; see tensor.h.)
#pragma once

#include "tensor.h"

namespace relu_mlp {

template <typename T>
T take(StableIValue value) {
  return torch::stable::detail::to<T>(value);
}

template <>
inline Tensor take<Tensor>(StableIValue value) {
  return Tensor(torch::stable::detail::to<AtenTensorHandle>(value));
}

template <>
inline std::vector<Tensor> take<std::vector<Tensor>>(StableIValue value) {
  const auto list = torch::stable::detail::to<StableListHandle>(value);
  std::size_t size;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
  std::vector<Tensor> tensors;
  tensors.reserve(size);
  for (std::size_t n = 0; n < size; ++n) {
    StableIValue item;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, n, &item));
    tensors.push_back(take<Tensor>(item));
  }
  TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  return tensors;
}

inline StableIValue give(Tensor tensor) {
  return torch::stable::detail::from(tensor.release());
}

inline StableIValue give(std::vector<Tensor> tensors) {
  StableListHandle list;
  TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(tensors.size(), &list));
  for (Tensor& tensor : tensors) {
    TORCH_ERROR_CODE_CHECK(
        torch_list_push_back(list, give(std::move(tensor))));
  }
  return torch::stable::detail::from(list);
}

} // namespace relu_mlp
