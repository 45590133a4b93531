// PyTorch's own threads.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <atomic>
#include <cstdint>
#include <exception>

#include "error.h"

namespace relu_mlp {

// Calls f(begin, end) for ranges that cover [0, count), on PyTorch's threads
// if there are more than `grain` elements. An exception of f must not cross
// PyTorch's C interface, so it is caught in its thread and rethrown here.
template <typename F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count <= grain) {
    f(int64_t(0), count);
    return;
  }
  struct Call {
    const F& f;
    std::atomic_flag has_failed;
    std::exception_ptr error;
  } call{f, {}, {}};
  check_call(torch_parallel_for(
      0, count, grain,
      [](int64_t begin, int64_t end, void* context) {
        Call& call = *static_cast<Call*>(context);
        try {
          call.f(begin, end);
        } catch (...) {
          if (!call.has_failed.test_and_set()) {
            call.error = std::current_exception();
          }
        }
      },
      &call));
  if (call.error) {
    std::rethrow_exception(call.error);
  }
}

} // namespace relu_mlp
