// The output activations: the one table of what there is, how it is computed,
// and its derivative. The operators, the CPU and CUDA all read it. Python has a
// table of its own, in relu_mlp/activations.py, and compares the names when it
// loads the library (relu_mlp/ops/library.py).
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

// What the operators call them, in the order of the enumerators.
#define RELU_MLP_NAME(name) #name,
inline constexpr std::string_view activation_names[] = {
    RELU_MLP_ACTIVATIONS(RELU_MLP_NAME)};
#undef RELU_MLP_NAME

// What computes y = phi(z) for a whole layer.
enum class AppliedBy {
  epilogue, // the product that computes z, while it writes it
  pytorch, // the in-place operator of PyTorch that the row names
  elementwise, // the row's own `forward`, after the product
};

// A row of the table. It has these members:
//   applied_by         what computes a whole layer
//   in_place           PyTorch's operator for AppliedBy::pytorch, else null
//   forward(z)         phi(z). CUDA's fused kernels always call this
//   backward(grad, y)  grad * phi'(z), with phi' as a function of y = phi(z)
// `backward` multiplies in PyTorch's order, so that 0 * inf occurs in the same
// places. The arithmetic is in float or double.
//
// There is no definition for the general case: a name without a row does not
// compile.
template <Activation phi>
struct ActivationRow;

template <>
struct ActivationRow<Activation::none> {
  static constexpr AppliedBy applied_by = AppliedBy::epilogue;
  static constexpr const char* in_place = nullptr;

  template <typename C>
  RELU_MLP_HOST_DEVICE static C forward(C z) {
    return z;
  }
  template <typename C>
  RELU_MLP_HOST_DEVICE static C backward(C grad, C) {
    return grad;
  }
};

// NaN passes: in `forward` as itself, in `backward` it lets the gradient
// through. `backward` selects and does not multiply, so an infinite gradient at
// a unit that is off gives 0.
template <>
struct ActivationRow<Activation::relu> {
  static constexpr AppliedBy applied_by = AppliedBy::epilogue;
  static constexpr const char* in_place = nullptr;

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

  template <typename C>
  RELU_MLP_HOST_DEVICE static C forward(C z) {
    return C(1) / (C(1) + std::exp(-z));
  }
  template <typename C>
  RELU_MLP_HOST_DEVICE static C backward(C grad, C y) {
    return grad * (C(1) - y) * y;
  }
};

template <>
struct ActivationRow<Activation::tanh> {
  static constexpr AppliedBy applied_by = AppliedBy::pytorch;
  static constexpr const char* in_place = "aten::tanh_";

  template <typename C>
  RELU_MLP_HOST_DEVICE static C forward(C z) {
    return std::tanh(z);
  }
  template <typename C>
  RELU_MLP_HOST_DEVICE static C backward(C grad, C y) {
    return grad * (C(1) - y * y);
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

// Returns f<ActivationRow<phi>>() for an activation that is known at run time.
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

// What computes phi for a whole layer.
inline AppliedBy applied_by(Activation phi) {
  return with_row(phi, []<typename Row>() { return Row::applied_by; });
}

#undef RELU_MLP_ACTIVATIONS

} // namespace relu_mlp
