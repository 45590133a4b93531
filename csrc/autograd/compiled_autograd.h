// Compiled autograd records a backward pass as a graph of functions. Each node
// puts one function into it, whose arguments are all that the node has saved.
#pragma once

#include <torch/csrc/dynamo/compiled_autograd.h>

#include <string>
#include <utility>

namespace relu_mlp::node {

using torch::dynamo::autograd::PackedArgs;

// Puts `function` into the graph that is being recorded, and returns what it
// returns there for `inputs` and `arguments`.
inline torch::autograd::variable_list record_function(
    const torch::autograd::Node& node,
    torch::autograd::functional_apply_t function,
    const torch::autograd::variable_list& inputs,
    const PackedArgs& arguments,
    const torch::dynamo::autograd::SwapSavedVariables& saved) {
  using namespace torch::dynamo::autograd;
  const auto& recorder = getPyCompilerInterface();
  std::vector<at::TypePtr> schema;
  schema.reserve(arguments.vec().size());
  for (const at::IValue& argument : arguments.vec()) {
    schema.push_back(
        argument.isTensor() ? at::TypePtr(at::TensorType::get())
                            : argument.type());
  }
  const std::string name = recorder->bind_function(
      saved.get_py_compiler(), node.name(), std::move(function),
      std::move(schema), /*is_custom_function=*/true, /*is_traceable=*/true);
  using Metadata = std::vector<std::optional<torch::autograd::InputMetadata>>;
  return recorder->call_function(
      saved.get_py_compiler(), "apply_functional", name, inputs,
      arguments.vec(),
      IValuePacker<Metadata>::pack(get_input_metadata(node.next_edges())));
}

} // namespace relu_mlp::node
