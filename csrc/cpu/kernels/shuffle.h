// The two ways to zip a pair of vectors. Transposition and sums over lanes are
// built from them. Without __builtin_shufflevector those use plain loops
// instead.
#pragma once

#include "vec.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define RELU_MLP_HAS_SHUFFLE
#include <utility> // for std::index_sequence, which is a type, not a function
#endif
#endif

namespace relu_mlp::cpu::RELU_MLP_ISA {
namespace {

#if defined(RELU_MLP_HAS_SHUFFLE)
// (a0 b0 a1 b1 ...) of the lower, and of the upper halves of a and b.
template <typename V, std::size_t... i>
RELU_MLP_INLINE V zip_lower(V a, V b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, (i / 2 + i % 2 * sizeof...(i))...);
}
template <typename V, std::size_t... i>
RELU_MLP_INLINE V zip_upper(V a, V b, std::index_sequence<i...>) {
  return __builtin_shufflevector(
      a, b, (sizeof...(i) / 2 + i / 2 + i % 2 * sizeof...(i))...);
}
#endif

} // namespace
} // namespace relu_mlp::cpu::RELU_MLP_ISA
