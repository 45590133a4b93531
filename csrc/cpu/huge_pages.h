// Huge pages for large allocations. The system maps new memory page by page,
// when it is first written. With pages of 4 kB that takes several times as long
// as the writing.
#pragma once

#include <cstdint>

#include "tuning.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace relu_mlp::cpu {

// Requests pages of 2 MB for memory that is large enough. The content does not
// change. Linux uses such pages only on request where
// transparent_hugepage/enabled is "madvise", the usual setting. A refusal
// changes nothing.
inline void prefer_huge_pages([[maybe_unused]] void* data, int64_t bytes) {
  if (bytes < Tuning::min_huge_bytes) {
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
