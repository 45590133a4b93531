// Vectors of the width that the including file names, with the operators of
// GCC's and Clang's vector types. With another compiler a vector is one number,
// which is slow but correct.
//
// The including file defines
//   RELU_MLP_ISA                the namespace of everything here
//   RELU_MLP_VECTOR_BYTES       the width of a vector
//   RELU_MLP_VECTOR_REGISTERS   the number of vector registers
// and may define RELU_MLP_MASKED_ACCESS if it declares better versions of
// load_some and store_some (x86.h).
//
// Code that is compiled for one instruction set must not use an inline function
// of the standard library: the linker keeps one copy of it for all callers, and
// that copy might need instructions that the processor lacks.
#pragma once

#include <cstdint>

namespace relu_mlp::cpu::RELU_MLP_ISA {
namespace {

#if defined(__GNUC__)
template <typename C>
struct Simd {
  static constexpr int64_t lanes = RELU_MLP_VECTOR_BYTES / sizeof(C);
  typedef C Vec __attribute__((vector_size(RELU_MLP_VECTOR_BYTES)));
  // The same vector in memory, with the alignment of an element.
  typedef C UnalignedVec
      __attribute__((vector_size(RELU_MLP_VECTOR_BYTES), aligned(sizeof(C))));
};
#define RELU_MLP_INLINE inline __attribute__((always_inline))
#define RELU_MLP_UNROLL _Pragma("GCC unroll 32")
#else
template <typename C>
struct Simd {
  static constexpr int64_t lanes = 1;
  using Vec = C;
  using UnalignedVec = C;
};
#define RELU_MLP_INLINE inline
#define RELU_MLP_UNROLL
#endif

template <typename C>
using Vec = typename Simd<C>::Vec;
template <typename C>
constexpr int64_t lanes = Simd<C>::lanes;

template <typename C>
RELU_MLP_INLINE Vec<C> load(const C* from) {
  return *reinterpret_cast<const typename Simd<C>::UnalignedVec*>(from);
}

template <typename C>
RELU_MLP_INLINE void store(C* to, Vec<C> v) {
  *reinterpret_cast<typename Simd<C>::UnalignedVec*>(to) = v;
}

template <typename C>
RELU_MLP_INLINE Vec<C> broadcast(C value) {
  return value - Vec<C>{};
}

#if !defined(RELU_MLP_MASKED_ACCESS)
// Load and store the first `count` < lanes elements. Elements that are not
// loaded are 0.
template <typename C>
RELU_MLP_INLINE Vec<C> load_some(const C* from, int64_t count) {
  C buffer[lanes<C>] = {};
  for (int64_t i = 0; i < count; ++i) {
    buffer[i] = from[i];
  }
  return load(buffer);
}

template <typename C>
RELU_MLP_INLINE void store_some(C* to, Vec<C> v, int64_t count) {
  C buffer[lanes<C>];
  store(buffer, v);
  for (int64_t i = 0; i < count; ++i) {
    to[i] = buffer[i];
  }
}
#endif

} // namespace
} // namespace relu_mlp::cpu::RELU_MLP_ISA
