// The dispatcher's stack: operators take their arguments from it and give it
// their results. A kernel owns the arguments on the stack. It takes all of them
// before it does anything that can fail. (TORCH_BOX does the same with
// torch::stable::Tensor; see tensor.h.)
#pragma once

#include <memory>
#include <new>
#include <tuple>

#include "tensor.h"

namespace relu_mlp {

template <typename T>
struct Take {
  static T from(StableIValue value) {
    return torch::stable::detail::to<T>(value);
  }
};

template <typename T>
T take(StableIValue value) {
  return Take<T>::from(value);
}

template <>
struct Take<Tensor> {
  static Tensor from(StableIValue value) {
    return Tensor(take<AtenTensorHandle>(value));
  }
};

template <typename T>
struct Take<std::vector<T>> {
  static std::vector<T> from(StableIValue value) {
    const std::unique_ptr<StableListOpaque, decltype(&torch_delete_list)> list(
        take<StableListHandle>(value), torch_delete_list);
    std::size_t size;
    check_call(torch_list_size(list.get(), &size));
    std::vector<T> items;
    items.reserve(size);
    for (std::size_t n = 0; n < size; ++n) {
      StableIValue item;
      check_call(torch_list_get_item(list.get(), n, &item));
      items.push_back(take<T>(item));
    }
    return items;
  }
};

// LibTorch's own conversion leaks: it allocates a string with `new` and returns
// a copy.
template <>
struct Take<std::string> {
  static std::string from(StableIValue value) {
    const std::unique_ptr<StringOpaque, decltype(&torch_delete_string)> text(
        take<StringHandle>(value), torch_delete_string);
    std::size_t length;
    const char* characters;
    check_call(torch_string_length(text.get(), &length));
    check_call(torch_string_c_str(text.get(), &characters));
    return std::string(characters, length);
  }
};

template <typename T>
StableIValue give(T value) {
  return torch::stable::detail::from(value);
}

inline StableIValue give(Tensor tensor) {
  return give(tensor.release());
}

inline StableIValue give(std::string text) {
  StringHandle handle;
  check_call(torch_new_string_handle(text.data(), text.size(), &handle));
  return give(handle);
}

template <typename T>
StableIValue give(std::vector<T> items) {
  StableListHandle list;
  check_call(torch_new_list_reserve_size(items.size(), &list));
  for (T& item : items) {
    check_call(torch_list_push_back(list, give(std::move(item))));
  }
  return give(list);
}

// A function that the dispatcher calls.
using BoxedKernel =
    void (*)(StableIValue* stack, uint64_t inputs, uint64_t outputs);

// `kernel`, but every exception becomes a RuntimeError in Python.
template <void (*kernel)(StableIValue*)>
void guarded(StableIValue* stack, uint64_t, uint64_t) {
  try {
    kernel(stack);
  } catch (const std::bad_alloc&) { // would be a MemoryError
    fail("can't allocate memory: not even a little");
  }
}

template <typename Result, typename... Arguments>
struct Boxed {
  template <Result (*function)(Arguments...)>
  static void kernel(StableIValue* stack) {
    auto arguments = take_all(stack, std::index_sequence_for<Arguments...>());
    if constexpr (std::is_void_v<Result>) {
      std::apply(function, std::move(arguments));
    } else {
      stack[0] = give(std::apply(function, std::move(arguments)));
    }
  }

 private:
  template <std::size_t... n>
  static std::tuple<Arguments...> take_all(
      [[maybe_unused]] const StableIValue* stack,
      std::index_sequence<n...>) {
    return {take<Arguments>(stack[n])...};
  }
};
template <typename Result, typename... Arguments>
Boxed<Result, Arguments...> boxed_like(Result (*)(Arguments...));

// A boxed kernel that calls a plain function.
template <auto function>
constexpr BoxedKernel boxed =
    &guarded<&decltype(boxed_like(function))::template kernel<function>>;

} // namespace relu_mlp
