// The boxed kernels that the dispatcher calls. Each takes its arguments from
// the stack, checks them, calls a pass of the device, and puts the results on
// the stack.
#pragma once

#include "checks.h"
#include "saved.h"
#include "stack.h"

namespace relu_mlp {

template <const Passes& passes>
ForwardResult checked_forward(
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases,
    const std::string& output_activation,
    bool save_hidden) {
  check_layers(x, weights, biases);
  if (passes.checks_devices) {
    check_devices(x, weights, biases);
  }
  Tensor holder;
  ForwardResult result = passes.forward(
      as_matrix(x, holder), weights, biases,
      parse_activation(output_activation), save_hidden);
  result.y = with_leading_sizes(std::move(result.y), x);
  return result;
}

template <const Passes& passes>
void forward(StableIValue* stack) {
  const auto x = take<Tensor>(stack[0]);
  const auto weights = take<std::vector<Tensor>>(stack[1]);
  const auto biases = take<std::vector<Tensor>>(stack[2]);
  const auto output_activation = take<std::string>(stack[3]);
  const bool save_hidden = take<bool>(stack[4]);
  ForwardResult result = checked_forward<passes>(
      x, weights, biases, output_activation, save_hidden);
  stack[0] = give(std::move(result.y));
  stack[1] = give(std::move(result.hidden));
}

// The operator `relu_mlp`; its derivative is registered in Python.
template <const Passes& passes>
void differentiable(StableIValue* stack) {
  const auto x = take<Tensor>(stack[0]);
  const auto weights = take<std::vector<Tensor>>(stack[1]);
  const auto biases = take<std::vector<Tensor>>(stack[2]);
  const auto output_activation = take<std::string>(stack[3]);
  stack[0] = give(
      checked_forward<passes>(x, weights, biases, output_activation, false).y);
}

// Returns the needed gradients. The gradient of x has the shape of x.
inline StableIValue give_needed(
    Gradients gradients,
    const Needs& needs,
    const Tensor& grad_output) {
  if (needs.x()) {
    gradients[0] = with_leading_sizes(std::move(gradients[0]), grad_output);
  }
  std::erase_if(gradients, [](const Tensor& grad) { return !grad.get(); });
  return give(std::move(gradients));
}

template <const Passes& passes>
void backward(StableIValue* stack) {
  const auto grad_output = take<Tensor>(stack[0]);
  const auto saved = take<std::vector<Tensor>>(stack[1]);
  const auto output_activation = take<std::string>(stack[2]);
  const auto flags = take<std::string>(stack[3]);
  check_backward("backward", flags, grad_output);
  const Needs needs{flags};
  if (needs.lowest_layer() == needs.layers()) {
    stack[0] = give(std::vector<Tensor>{});
    return;
  }
  check_saved(grad_output, saved, passes.checks_devices);
  const Activation activation = parse_activation(output_activation);
  Tensor grad_holder, x_holder, y_holder;
  const Tensor& grad_matrix = as_matrix(grad_output, grad_holder);
  const Saved operands =
      unpack(saved, grad_matrix, activation, needs, x_holder, y_holder);
  stack[0] = give_needed(
      passes.backward(grad_matrix, operands, activation, needs), needs,
      grad_output);
}

template <const Passes& passes>
void backward_vjp(StableIValue* stack) {
  const auto grad_output = take<Tensor>(stack[0]);
  const auto saved = take<std::vector<Tensor>>(stack[1]);
  const auto output_activation = take<std::string>(stack[2]);
  const auto flags = take<std::string>(stack[3]);
  const auto cotangents = take<std::vector<Tensor>>(stack[4]);
  const auto given = take<std::string>(stack[5]);
  const auto wanted = take<std::string>(stack[6]);
  check_backward("backward_vjp", flags, grad_output);
  check_flags("given", given, std::count(flags.begin(), flags.end(), '1'));
  check_flags("wanted", wanted, 1 + std::ssize(saved));
  const auto count = std::count(given.begin(), given.end(), '1');
  if (std::ssize(cotangents) != count) {
    fail(
        "relu_mlp::backward_vjp: given '", given, "' asks for ", count,
        " tensors in cotangents, got ", cotangents.size());
  }
  check_saved(grad_output, saved, passes.checks_devices);
  const Activation activation = parse_activation(output_activation);
  const Needs needs{flags};
  Tensor grad_holder, x_holder, y_holder, cotangent_holder;
  const Tensor& grad_matrix = as_matrix(grad_output, grad_holder);
  const Saved operands =
      unpack(saved, grad_matrix, activation, needs, x_holder, y_holder);
  std::vector<Tensor> results = passes.backward_vjp(
      grad_matrix, operands, activation,
      unpack_cotangents(
          cotangents, given, grad_output, operands, needs, cotangent_holder),
      wanted);
  for (std::size_t n = 0, result = 0; n < wanted.size(); ++n) {
    if (wanted[n] == '1') {
      const Tensor& like = n == 0 ? grad_output : saved[n - 1];
      Tensor& gradient = results[result++];
      gradient = with_leading_sizes(std::move(gradient), like);
    }
  }
  stack[0] = give(std::move(results));
}

template <const Passes& passes>
void recompute_backward(StableIValue* stack) {
  const auto grad_output = take<Tensor>(stack[0]);
  const auto x = take<Tensor>(stack[1]);
  const auto weights = take<std::vector<Tensor>>(stack[2]);
  const auto biases = take<std::vector<Tensor>>(stack[3]);
  const auto output_activation = take<std::string>(stack[4]);
  const auto flags = take<std::string>(stack[5]);
  check_layers(x, weights, biases);
  check_backward("recompute_backward", flags, grad_output);
  const Needs needs{flags};
  if (needs.layers() != weights.size()) {
    fail(
        "relu_mlp::recompute_backward: needs must have ",
        1 + 2 * weights.size(), " characters, got '", flags, "'");
  }
  check_output_like("grad_output", grad_output, x, weights);
  if (passes.checks_devices) {
    check_devices(x, weights, biases);
    check_device(grad_output, x, "grad_output");
  }
  Tensor grad_holder, x_holder;
  stack[0] = give_needed(
      passes.recompute_backward(
          as_matrix(grad_output, grad_holder), as_matrix(x, x_holder), weights,
          biases, parse_activation(output_activation), needs),
      needs, grad_output);
}

template <const Passes& passes>
void loss_and_grads(StableIValue* stack) {
  const auto x = take<Tensor>(stack[0]);
  const auto target = take<Tensor>(stack[1]);
  const auto weights = take<std::vector<Tensor>>(stack[2]);
  const auto biases = take<std::vector<Tensor>>(stack[3]);
  const auto loss_name = take<std::string>(stack[4]);
  const auto output_activation = take<std::string>(stack[5]);
  check_layers(x, weights, biases);
  const Loss loss = parse_loss(loss_name);
  check_target(target, x, weights, loss);
  const Activation activation = parse_activation(output_activation);
  const bool by_class = has_classes(loss, target);
  if (passes.checks_devices) {
    check_devices(x, weights, biases);
    check_device(target, x, "target");
  } else if (by_class) {
    check_classes(target, x, weights);
  }

  Tensor x_holder, target_holder;
  LossAndGradients result = passes.loss_and_grads(
      as_matrix(x, x_holder),
      by_class ? target : as_matrix(target, target_holder), weights, biases,
      loss, activation);

  std::vector<Tensor>& gradients = result.gradients;
  gradients.erase(gradients.begin()); // the gradient of x
  gradients.resize(weights.size() + biases.size());
  for (Tensor& gradient : gradients) {
    if (!gradient.get()) {
      gradient = empty<1>({0}, x);
    }
  }
  stack[0] = give(std::move(result.loss));
  stack[1] = give(std::move(gradients));
}

// The same operator, but it returns one list: its tensor, then its list.
template <void (*pass)(StableIValue*)>
void as_list(StableIValue* stack) {
  pass(stack);
  auto first = take<Tensor>(stack[0]);
  auto list = take<std::vector<Tensor>>(stack[1]);
  list.insert(list.begin(), std::move(first));
  stack[0] = give(std::move(list));
}

} // namespace relu_mlp
