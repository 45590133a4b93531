// The table of output activations: their names, how each is computed, and its
// derivative. The operators, the CPU and CUDA read this table. Python has its
// own table in relu_mlp/activations.py. It compares the names when it loads the
// library (relu_mlp/ops/library.py).
//
// To add an activation, add its name to the list and define its row.
#pragma once

#include <cmath>
#include <cstddef>
#include <string_view>

#include "arithmetic.h"

namespace relu_mlp {

#define RELU_MLP_ACTIVATIONS(F) F(none) F(relu) F(sigmoid) F(tanh)

#define RELU_MLP_ENUMERATOR(name) name,
enum class Activation { RELU_MLP_ACTIVATIONS(RELU_MLP_ENUMERATOR) };
#undef RELU_MLP_ENUMERATOR

// The names that the operators accept, in the order of the enumerators.
#define RELU_MLP_NAME(name) #name,
inline constexpr std::string_view activation_names[] = {
    RELU_MLP_ACTIVATIONS(RELU_MLP_NAME)};
#undef RELU_MLP_NAME

// How y = phi(z) is computed for a whole layer.
enum class AppliedBy {
  epilogue, // by the product that computes z, as it writes z
  pytorch, // by the in-place PyTorch operator that the row names
  elementwise, // by the row's `forward`, after the product
};

// A row of the table. It has these members:
//   applied_by         how a whole layer is computed
//   in_place           PyTorch's operator for AppliedBy::pytorch, else null
//   forward(z)         phi(z). CUDA's fused kernels always call this
//   backward(grad, y)  grad * phi'(z), with phi' as a function of y = phi(z)
//   has_curvature      whether that function of y is not piecewise constant
//   curvature(y)       its derivative, if has_curvature
// `backward` multiplies in PyTorch's order. Thus 0 * inf occurs in the same
// places. C is float or double.
//
// The primary template has no definition, so a name without a row does not
// compile.
template <Activation phi>
struct ActivationRow;

template <>
struct ActivationRow<Activation::none> {
  static constexpr AppliedBy applied_by = AppliedBy::epilogue;
  static constexpr const char* in_place = nullptr;
  static constexpr bool has_curvature = false;

  template <typename C>
  RELU_MLP_HOST_DEVICE static C forward(C z) {
    return z;
  }
  template <typename C>
  RELU_MLP_HOST_DEVICE static C backward(C grad, C) {
    return grad;
  }
};

// `forward` returns NaN for NaN. `backward` passes the gradient where y is NaN.
// It selects instead of multiplying, so an infinite gradient at an inactive
// unit gives 0.
template <>
struct ActivationRow<Activation::relu> {
  static constexpr AppliedBy applied_by = AppliedBy::epilogue;
  static constexpr const char* in_place = nullptr;
  static constexpr bool has_curvature = false;

  template <typename C>
  RELU_MLP_HOST_DEVICE static C forward(C z) {
    return z <= C(0) ? C(0) : z;
  }
  template <typename C>
  RELU_MLP_HOST_DEVICE static C backward(C grad, C y) {
    return y <= C(0) ? C(0) : grad;
  }
};

template <>
struct ActivationRow<Activation::sigmoid> {
  static constexpr AppliedBy applied_by = AppliedBy::pytorch;
  static constexpr const char* in_place = "aten::sigmoid_";
  static constexpr bool has_curvature = true;

  template <typename C>
  RELU_MLP_HOST_DEVICE static C forward(C z) {
    return C(1) / (C(1) + std::exp(-z));
  }
  template <typename C>
  RELU_MLP_HOST_DEVICE static C backward(C grad, C y) {
    return grad * (C(1) - y) * y;
  }
  template <typename C>
  RELU_MLP_HOST_DEVICE static C curvature(C y) {
    return C(1) - C(2) * y;
  }
};

template <>
struct ActivationRow<Activation::tanh> {
  static constexpr AppliedBy applied_by = AppliedBy::pytorch;
  static constexpr const char* in_place = "aten::tanh_";
  static constexpr bool has_curvature = true;

  template <typename C>
  RELU_MLP_HOST_DEVICE static C forward(C z) {
    return std::tanh(z);
  }
  template <typename C>
  RELU_MLP_HOST_DEVICE static C backward(C grad, C y) {
    return grad * (C(1) - y * y);
  }
  template <typename C>
  RELU_MLP_HOST_DEVICE static C curvature(C y) {
    return C(-2) * y;
  }
};

// What the products apply while they write z, and what PyTorch applies.
#define RELU_MLP_CHECK(name)                                                  \
  static_assert(                                                              \
      (ActivationRow<Activation::name>::applied_by == AppliedBy::epilogue) == \
          (Activation::name == Activation::none ||                            \
           Activation::name == Activation::relu),                             \
      "the products apply only none and relu");                               \
  static_assert(                                                              \
      (ActivationRow<Activation::name>::applied_by == AppliedBy::pytorch) ==  \
          (ActivationRow<Activation::name>::in_place != nullptr),             \
      "in_place is PyTorch's operator for AppliedBy::pytorch");
RELU_MLP_ACTIVATIONS(RELU_MLP_CHECK)
#undef RELU_MLP_CHECK

// Calls f<ActivationRow<phi>>() for an activation chosen at run time, and
// returns its result.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <typename F>
RELU_MLP_HOST_DEVICE auto with_row(Activation phi, const F& f) {
  switch (phi) {
#define RELU_MLP_CASE(name) \
  case Activation::name:    \
    return f.template operator()<ActivationRow<Activation::name>>();
    RELU_MLP_ACTIVATIONS(RELU_MLP_CASE)
#undef RELU_MLP_CASE
  }
#ifdef __GNUC__
  __builtin_unreachable();
#endif
}

// How phi is computed for a whole layer.
inline AppliedBy applied_by(Activation phi) {
  return with_row(phi, []<typename Row>() { return Row::applied_by; });
}

// Whether phi' is not piecewise constant as a function of y.
inline bool has_curvature(Activation phi) {
  return with_row(phi, []<typename Row>() { return Row::has_curvature; });
}

#undef RELU_MLP_ACTIVATIONS

} // namespace relu_mlp
