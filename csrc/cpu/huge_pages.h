// Large pages for large memory. What the system hands out fresh, it maps when it
// is first written: page by page, which for pages of 4 kB takes several times as
// long as writing them does.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace relu_mlp::cpu {

// Asks for pages of 2 MB under the memory, whose content stays what it is. Linux
// does so only on request where transparent_hugepage/enabled is "madvise", the
// usual setting. A refusal changes nothing. From 4 MB on, like NumPy.
inline void prefer_huge_pages([[maybe_unused]] void* data, int64_t bytes) {
  constexpr int64_t least_bytes = 4 << 20;
  if (bytes < least_bytes) {
    return;
  }
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = 2 << 20;
  const auto first = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (first + page - 1) / page * page;
  const std::uintptr_t end = (first + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

} // namespace relu_mlp::cpu
