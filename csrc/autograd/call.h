// The arguments of a network's call, and which road serves it.
//
//   direct     the CPU's passes on plain data (../direct.h)
//   operators  torch.ops.relu_mlp, through PyTorch's dispatcher: other devices
//              and layouts, wrong arguments, transforms, modes, the profiler
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <string>
#include <vector>

namespace relu_mlp::node {

struct Call {
  at::Tensor x; // (*, in_features)
  std::vector<at::Tensor> weights;
  // Empty, or one for each weight. A bias without elements is missing.
  std::vector<at::Tensor> biases;
  std::string activation;
  bool recompute = false;

  // Whether f(tensor) holds for a tensor of the call.
  template <typename F>
  bool any(const F& f) const {
    if (f(x)) {
      return true;
    }
    for (const at::Tensor& weight : weights) {
      if (f(weight)) {
        return true;
      }
    }
    for (const at::Tensor& bias : biases) {
      if (f(bias)) {
        return true;
      }
    }
    return false;
  }
};

inline bool carries_tangent(const at::Tensor& tensor) {
  return tensor.defined() && tensor._fw_grad(/*level=*/0).defined();
}

inline bool is_dtype_served(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble ||
      dtype == at::kBFloat16 || dtype == at::kHalf;
}

// Whether this is an ordinary dense tensor of the CPU or of CUDA: no subclass,
// no transform's wrapper, no other layout, no lazy conjugate or negative.
inline bool is_plain(const at::Tensor& tensor) {
  using c10::DispatchKey;
  static const c10::DispatchKeySet cpu(
      {DispatchKey::CPU, DispatchKey::AutogradCPU,
       DispatchKey::ADInplaceOrView}),
      cuda(
          {DispatchKey::CUDA, DispatchKey::AutogradCUDA,
           DispatchKey::ADInplaceOrView}),
      // Tensors that were made in inference mode have no autograd keys.
      inference_cpu(DispatchKey::CPU), inference_cuda(DispatchKey::CUDA);
  const c10::DispatchKeySet keys =
      tensor.key_set() - c10::autocast_dispatch_keyset;
  return keys == cpu || keys == cuda || keys == inference_cpu ||
      keys == inference_cuda;
}

// Whether this is such a tensor, or one that a transform has made of it.
inline bool is_plain_or_wrapped(const at::Tensor& tensor) {
  using c10::DispatchKey;
  static const c10::DispatchKeySet wrappers(
      {DispatchKey::FuncTorchGradWrapper, DispatchKey::FuncTorchBatched}),
      others(
          {DispatchKey::Python, DispatchKey::Functionalize,
           DispatchKey::BatchedNestedTensor});
  return is_plain(tensor) ||
      (tensor.key_set().has_any(wrappers) &&
       !tensor.key_set().has_any(others) && tensor.layout() == at::kStrided);
}

// Whether functorch transforms are active in this thread.
inline bool is_under_a_transform() {
  return c10::impl::tls_is_dispatch_key_included(
      c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Whether no mode, autocast, tracer or guard is active in this thread, apart
// from functorch transforms.
inline bool is_thread_plain_but_for_transforms() {
  using c10::DispatchKey;
  static const c10::DispatchKeySet transforms(
      {DispatchKey::FuncTorchDynamicLayerFrontMode,
       DispatchKey::FuncTorchDynamicLayerBackMode});
  const auto state = c10::impl::tls_local_dispatch_key_set();
  return (state.included_ - transforms) == c10::default_included_set &&
      state.excluded_ == c10::default_excluded_set;
}

// Whether no transform, mode, autocast, tracer or guard is active in this
// thread, except inference mode.
inline bool is_thread_plain() {
  static const c10::impl::LocalDispatchKeySet in_inference_mode = [] {
    const c10::impl::LocalDispatchKeySet plain(
        c10::impl::PODLocalDispatchKeySet{0, 0});
    const c10::impl::ForceDispatchKeyGuard restored(plain);
    const c10::InferenceMode guard(true);
    return c10::impl::tls_local_dispatch_key_set();
  }();
  const auto state = c10::impl::tls_local_dispatch_key_set();
  if (state.included_ == c10::default_included_set &&
      state.excluded_ == c10::default_excluded_set) {
    return true;
  }
  return state.included_ == in_inference_mode.included_ &&
      state.excluded_ == in_inference_mode.excluded_;
}

// Whether the profiler, or another observer, wants to see each operator.
inline bool is_observed() {
  return at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value();
}

} // namespace relu_mlp::node
