// Registers a namespace of operators with PyTorch.
#pragma once

#include <torch/csrc/stable/library.h>

#include <exception>
#include <list>
#include <utility>

namespace relu_mlp {

// Registers operators for the lifetime of this object. If the namespace already
// exists, from another copy of this library or from Python, this copy registers
// nothing. (STABLE_TORCH_LIBRARY ignores the error code and would continue with
// an uninitialized handle.)
class Registration {
 public:
  using Library = torch::stable::detail::StableLibrary;

  // A dispatch key, and the function that adds its kernels.
  struct KeyKernels {
    const char* key;
    void (*add)(Library&);
  };

  // `file` is the source that PyTorch reports for the operators.
  Registration(
      const char* name,
      const char* file,
      void (*define)(Library&),
      std::initializer_list<KeyKernels> kernels)
      : name_(name), file_(file) {
    if (aoti_torch_library_init_def(name, file, 0, &name_space_) !=
        TORCH_SUCCESS) {
      name_space_ = nullptr;
      return;
    }
    try {
      define(open(Library::Kind::FRAGMENT, nullptr));
      for (const KeyKernels& k : kernels) {
        k.add(open(Library::Kind::IMPL, k.key));
      }
    } catch (const std::exception&) {
      close();
    }
  }
  ~Registration() {
    close();
  }
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;

 private:
  Library& open(Library::Kind kind, const char* key) {
    return parts_.emplace_back(kind, name_, key, file_, 0);
  }
  void close() {
    while (!parts_.empty()) { // kernels go before definitions
      parts_.pop_back();
    }
    if (name_space_) {
      aoti_torch_delete_library_object(std::exchange(name_space_, nullptr));
    }
  }

  const char *const name_, *const file_;
  TorchLibraryHandle name_space_ = nullptr;
  std::list<Library> parts_;
};

} // namespace relu_mlp
