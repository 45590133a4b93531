// What goes wrong, as Python sees it: a RuntimeError whose text is the message
// alone. (The macros of LibTorch's headers add source files, lines and paths of
// the machine that compiled them.)
#pragma once

#include <cstdint>
#include <iomanip>
#include <sstream>
#include <stdexcept>

// What PyTorch says of the last call of its C interface that failed in this
// thread. There from PyTorch 2.13 on; the library loads on older ones, too.
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

// PyTorch's words for memory that cannot be had on the CPU, which programs look
// for that try again with fewer rows.
[[noreturn]] inline void fail_to_allocate(double bytes) {
  fail("DefaultCPUAllocator: can't allocate memory: you tried to allocate ",
       std::fixed, std::setprecision(0), bytes, " bytes.");
}

// Throws PyTorch's reason for a call that has just failed, where it gives one.
inline void fail_with_reason() {
#if defined(__GNUC__)
  if (torch_exception_get_what_without_backtrace) {
    fail(torch_exception_get_what_without_backtrace());
  }
#endif
}

// For what a function of PyTorch's C interface returns.
inline void check_call(int32_t error) {
  if (error != 0) [[unlikely]] {
    fail_with_reason();
    fail("a call of PyTorch failed, for the reason that PyTorch has printed");
  }
}

} // namespace relu_mlp
