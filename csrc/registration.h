// Registers a namespace of operators with PyTorch.
#pragma once

#include <torch/csrc/stable/library.h>

#include <exception>
#include <list>
#include <utility>

namespace relu_mlp {

// Registers operators as long as it lives, unless the namespace is there
// already: from another copy of this library, or from Python. Then this copy
// serves nothing. (STABLE_TORCH_LIBRARY ignores the error code and would go on
// with a handle that is not initialized.)
class Registration {
 public:
  using Library = torch::stable::detail::StableLibrary;

  // What to register, on which key of the dispatcher.
  struct Kernels {
    const char* key;
    void (*add)(Library&);
  };

  // `file` is where PyTorch says that the operators come from.
  Registration(
      const char* name,
      const char* file,
      void (*define)(Library&),
      std::initializer_list<Kernels> kernels)
      : name_(name), file_(file) {
    if (aoti_torch_library_init_def(name, file, 0, &name_space_) !=
        TORCH_SUCCESS) {
      name_space_ = nullptr;
      return;
    }
    try {
      define(open(Library::Kind::FRAGMENT, nullptr));
      for (const Kernels& k : kernels) {
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
