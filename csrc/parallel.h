// Parallel loops on PyTorch's own threads.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <atomic>
#include <cstdint>
#include <exception>

#include "error.h"

namespace relu_mlp {

// Calls f(begin, end) for ranges that cover [0, count), on PyTorch's threads if
// there are more than `grain` elements. An exception must not cross PyTorch's C
// interface. So each thread catches what f throws, and this function rethrows
// the first exception.
template <typename F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count <= grain) {
    f(int64_t(0), count);
    return;
  }
  struct State {
    const F& f;
    std::atomic_flag has_failed;
    std::exception_ptr error;
  } state{f, {}, {}};
  check_call(torch_parallel_for(
      0, count, grain,
      [](int64_t begin, int64_t end, void* context) {
        State& state = *static_cast<State*>(context);
        try {
          state.f(begin, end);
        } catch (...) {
          if (!state.has_failed.test_and_set()) {
            state.error = std::current_exception();
          }
        }
      },
      &state));
  if (state.error) {
    std::rethrow_exception(state.error);
  }
}

} // namespace relu_mlp
