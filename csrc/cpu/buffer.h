// Uninitialised memory, aligned for vectors.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace relu_mlp::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

template <typename C>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count)
      : data_(count ? static_cast<C*>(::operator new(
                          count * sizeof(C), std::align_val_t(64)))
                    : nullptr) {}
  C* get() const {
    return data_.get();
  }

 private:
  struct Delete {
    void operator()(C* data) const {
      ::operator delete(data, std::align_val_t(64));
    }
  };
  std::unique_ptr<C, Delete> data_;
};

} // namespace relu_mlp::cpu
