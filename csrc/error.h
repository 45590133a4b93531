// Errors. Python sees a RuntimeError with the message alone. (The macros in
// LibTorch's headers add source files, lines and paths of the build machine.)
#pragma once

#include <cstdint>
#include <iomanip>
#include <sstream>
#include <stdexcept>

// PyTorch's message about the last call of its C interface that failed in this
// thread. PyTorch has this function since 2.13. The symbol is weak because the
// library also loads with older versions.
#if defined(__GNUC__)
extern "C" __attribute__((weak)) const char*
torch_exception_get_what_without_backtrace();
#endif

namespace relu_mlp {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// PyTorch's message when the CPU is out of memory. Programs that retry with
// fewer rows look for these words.
[[noreturn]] inline void fail_to_allocate(double bytes) {
  fail(
      "DefaultCPUAllocator: can't allocate memory: you tried to allocate ",
      std::fixed, std::setprecision(0), bytes, " bytes.");
}

// Throws PyTorch's message about the call that has just failed, if it has one.
inline void fail_with_reason() {
#if defined(__GNUC__)
  if (torch_exception_get_what_without_backtrace) {
    fail(torch_exception_get_what_without_backtrace());
  }
#endif
}

// Checks the error code of a function of PyTorch's C interface.
inline void check_call(int32_t error) {
  if (error != 0) [[unlikely]] {
    fail_with_reason();
    fail("a call of PyTorch failed, for the reason that PyTorch has printed");
  }
}

} // namespace relu_mlp
