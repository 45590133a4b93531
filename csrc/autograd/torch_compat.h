// What differs between the versions of PyTorch that the node is compiled
// against.
#pragma once

#include <torch/csrc/autograd/function.h>

#include <memory>
#include <utility>

namespace relu_mlp::node {

// A pointer to a node as an Edge holds it. It was a shared_ptr until 2.12.
using NodePointer = decltype(std::declval<torch::autograd::Edge>().function);

template <typename N>
auto make_node() {
#if __has_include(<torch/csrc/autograd/node.h>)
  return c10::make_intrusive<N>();
#else
  return std::shared_ptr<N>(new N(), torch::autograd::deleteNode);
#endif
}

} // namespace relu_mlp::node
