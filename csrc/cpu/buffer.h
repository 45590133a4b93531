// Uninitialized memory for the duration of a call, aligned for vectors.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "../arithmetic.h"
#include "../error.h"
#include "huge_pages.h"
#include "tuning.h"

namespace relu_mlp::cpu {

constexpr int64_t alignment = 64;

struct AlignedDelete {
  void operator()(void* memory) const {
    ::operator delete(memory, std::align_val_t(alignment));
  }
};
using AlignedMemory = std::unique_ptr<void, AlignedDelete>;

inline AlignedMemory aligned_memory(int64_t bytes) {
  AlignedMemory memory(
      ::operator new(bytes, std::align_val_t(alignment), std::nothrow));
  if (!memory) {
    fail_to_allocate(double(bytes));
  }
  prefer_huge_pages(memory.get(), bytes);
  return memory;
}

// Memory that a thread keeps between calls. Small networks need the same few
// buffers in every call, and allocating aligned memory takes longer than
// computing such a network.
class Scratch {
 public:
  static Scratch& of_this_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }
  // Returns memory that the caller must give back, or null if too little is
  // left.
  void* take(int64_t bytes) {
    const int64_t begin = pieces_.empty() ? 0 : pieces_.back().end;
    const int64_t end = begin + round_up(bytes, alignment);
    if (end > capacity) {
      return nullptr;
    }
    if (!memory_) {
      memory_ = aligned_memory(capacity);
    }
    pieces_.push_back({start() + begin, end, false});
    return pieces_.back().data;
  }
  // Pieces may be given back in any order. Usually the last piece is the first.
  void give_back(const void* data) {
    auto piece = pieces_.rbegin();
    while (piece->data != data) {
      ++piece;
    }
    piece->is_free = true;
    while (!pieces_.empty() && pieces_.back().is_free) {
      pieces_.pop_back();
    }
  }

 private:
  static constexpr int64_t capacity = Tuning::scratch_bytes;

  struct Piece {
    char* data;
    int64_t end; // of the piece, as bytes from the start of the memory
    bool is_free;
  };

  char* start() const {
    return static_cast<char*>(memory_.get());
  }

  AlignedMemory memory_;
  std::vector<Piece> pieces_; // one after another; the last one is in use
};

// The address sanitizer cannot tell pieces of one allocation apart. Under it
// every buffer has its own allocation.
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define RELU_MLP_ADDRESS_SANITIZER
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(RELU_MLP_ADDRESS_SANITIZER)
constexpr bool shares_scratch = false;
#else
constexpr bool shares_scratch = true;
#endif

// `count` elements. A buffer belongs to the thread that made it.
template <typename C>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    if (count == 0) {
      return;
    }
    const int64_t bytes = count * static_cast<int64_t>(sizeof(C));
    if constexpr (shares_scratch) {
      data_ = static_cast<C*>(Scratch::of_this_thread().take(bytes));
    }
    is_scratch_ = data_ != nullptr;
    if (!is_scratch_) {
      data_ = static_cast<C*>(aligned_memory(bytes).release());
    }
  }
  Buffer(Buffer&& other) noexcept {
    *this = std::move(other);
  }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(is_scratch_, other.is_scratch_);
    return *this;
  }
  ~Buffer() {
    if (is_scratch_) {
      Scratch::of_this_thread().give_back(data_);
    } else if (data_) {
      AlignedDelete()(data_);
    }
  }
  C* get() const {
    return data_;
  }

 private:
  C* data_ = nullptr;
  bool is_scratch_ = false;
};

} // namespace relu_mlp::cpu
