// The operators of torch.ops.relu_mlp: their schemas, and their registration
// for the passes of a device. relu_mlp/ops/library.py has the same schemas for
// processes without this library. It compares them with these.
#pragma once

#include "boxed_passes.h"

namespace relu_mlp {

inline void define_operators(torch::stable::detail::StableLibrary& m) {
  m.def(
      "relu_mlp(Tensor x, Tensor[] weights, Tensor[] biases, "
      "str output_activation=\"none\") -> Tensor");
  m.def(
      "forward(Tensor x, Tensor[] weights, Tensor[] biases, "
      "str output_activation, bool save_hidden) -> (Tensor, Tensor[])");
  // saved: the operands that the needed gradients depend on, among x, y, the
  // weights and the hidden activations, in this order. needs: '0' or '1' for x,
  // every weight and every bias. Returns only the needed gradients, in that
  // order.
  m.def(
      "backward(Tensor grad_output, Tensor[] saved, str output_activation, "
      "str needs) -> Tensor[]");
  // The vector-Jacobian product of `backward`. given: '0' or '1' for every
  // result of `backward`; cotangents has the gradients of those given. wanted:
  // '0' or '1' for grad_output and for every tensor in saved. Returns only the
  // wanted gradients, in that order.
  m.def(
      "backward_vjp(Tensor grad_output, Tensor[] saved, str output_activation, "
      "str needs, Tensor[] cotangents, str given, str wanted) -> Tensor[]");
  // `backward` from x and the parameters, if nothing else was saved.
  m.def(
      "recompute_backward(Tensor grad_output, Tensor x, Tensor[] weights, "
      "Tensor[] biases, str output_activation, str needs) -> Tensor[]");
  // Returns the loss, the gradients of the weights, then one gradient for every
  // entry of biases. It is empty if the entry is empty.
  m.def(
      "loss_and_grads(Tensor x, Tensor target, Tensor[] weights, "
      "Tensor[] biases, str loss, str output_activation) "
      "-> (Tensor, Tensor[])");
  // C++ code that Inductor generates calls these operators instead
  // (relu_mlp/ops/cpp_graphs.py). They have no Python kernel on the Autograd
  // key. A package of AOTInductor holds a lock while it calls them, and would
  // deadlock with a thread that holds the GIL and waits for that lock.
  // Generated code cannot return a tensor and a list, so these operators return
  // one list of both.
  m.def(
      "_relu_mlp_in_cpp(Tensor x, Tensor[] weights, Tensor[] biases, "
      "str output_activation=\"none\") -> Tensor");
  m.def(
      "_forward_in_cpp(Tensor x, Tensor[] weights, Tensor[] biases, "
      "str output_activation, bool save_hidden) -> Tensor[]");
  m.def(
      "_backward_in_cpp(Tensor grad_output, Tensor[] saved, "
      "str output_activation, str needs) -> Tensor[]");
  m.def(
      "_backward_vjp_in_cpp(Tensor grad_output, Tensor[] saved, "
      "str output_activation, str needs, Tensor[] cotangents, str given, "
      "str wanted) -> Tensor[]");
  m.def(
      "_recompute_backward_in_cpp(Tensor grad_output, Tensor x, "
      "Tensor[] weights, Tensor[] biases, str output_activation, str needs) "
      "-> Tensor[]");
  m.def(
      "_loss_and_grads_in_cpp(Tensor x, Tensor target, Tensor[] weights, "
      "Tensor[] biases, str loss, str output_activation) -> Tensor[]");
}

template <const Passes& passes>
void register_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("relu_mlp", &guarded<&differentiable<passes>>);
  m.impl("forward", &guarded<&forward<passes>>);
  m.impl("backward", &guarded<&backward<passes>>);
  m.impl("recompute_backward", &guarded<&recompute_backward<passes>>);
  m.impl("loss_and_grads", &guarded<&loss_and_grads<passes>>);
  m.impl("_relu_mlp_in_cpp", &guarded<&differentiable<passes>>);
  m.impl("_forward_in_cpp", &guarded<&as_list<forward<passes>>>);
  m.impl("_backward_in_cpp", &guarded<&backward<passes>>);
  m.impl("_recompute_backward_in_cpp", &guarded<&recompute_backward<passes>>);
  m.impl("_loss_and_grads_in_cpp", &guarded<&as_list<loss_and_grads<passes>>>);
  if (passes.backward_vjp) {
    m.impl("backward_vjp", &guarded<&backward_vjp<passes>>);
    m.impl("_backward_vjp_in_cpp", &guarded<&backward_vjp<passes>>);
  }
}

} // namespace relu_mlp
