#include "python.h"

#include "children.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

namespace relu_mlp::node::python {
namespace {

// Never deleted: another thread may use it until the process ends.
PyObject* kernels = nullptr;

// Calls a Python kernel, with the GIL, and converts its result.
template <typename Result, typename... Arguments>
Result call(const char* name, Arguments&&... arguments) {
  const pybind11::gil_scoped_acquire gil;
  try {
    const auto all = pybind11::reinterpret_borrow<pybind11::dict>(kernels);
    return all[name](std::forward<Arguments>(arguments)...)
        .template cast<Result>();
  } catch (pybind11::error_already_set& error) {
    error.restore();
    python_error raised;
    raised.persist();
    throw std::move(raised);
  }
}

// None for an undefined tensor.
pybind11::list with_none(const std::vector<at::Tensor>& tensors) {
  pybind11::list list;
  for (const at::Tensor& tensor : tensors) {
    list.append(
        tensor.defined() ? pybind11::cast(tensor)
                         : pybind11::object(pybind11::none()));
  }
  return list;
}

} // namespace

void set_kernels(PyObject* dict) {
  Py_INCREF(dict);
  kernels = dict;
}

UsingExtension::UsingExtension() {
  const pybind11::gil_scoped_acquire gil;
  outer_ = call<pybind11::object>("set_backend", "extension").release().ptr();
}

UsingExtension::~UsingExtension() {
  const pybind11::gil_scoped_acquire gil;
  call<pybind11::object>(
      "set_backend", pybind11::reinterpret_steal<pybind11::object>(outer_));
}

bool has_batching_rules() {
  return PyDict_GetItemString(kernels, "batched_relu_mlp") != nullptr;
}

bool is_extension_in_force(const at::Tensor& x) {
  const pybind11::gil_scoped_acquire gil;
  // Python knows what to say where it is not.
  return (serves_device(x) && is_backend_extension()) ||
      call<bool>("is_extension_in_force", x);
}

at::Tensor relu_mlp(const Call& c) {
  return call<at::Tensor>("relu_mlp", c.x, c.weights, c.biases, c.activation);
}

std::tuple<at::Tensor, std::vector<at::Tensor>> forward(
    const Call& c,
    bool save_hidden) {
  return call<std::tuple<at::Tensor, std::vector<at::Tensor>>>(
      "forward", c.x, c.weights, c.biases, c.activation, save_hidden);
}

std::vector<at::Tensor> backward(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& needs) {
  return call<std::vector<at::Tensor>>(
      "backward", grad_output, saved, activation, needs);
}

namespace batched {

at::Tensor relu_mlp(const Call& c) {
  return call<at::Tensor>(
      "batched_relu_mlp", c.x, c.weights, c.biases, c.activation);
}

std::tuple<at::Tensor, std::vector<at::Tensor>> forward(
    const Call& c,
    bool save_hidden) {
  return call<std::tuple<at::Tensor, std::vector<at::Tensor>>>(
      "batched_forward", c.x, c.weights, c.biases, c.activation, save_hidden);
}

std::vector<at::Tensor> backward(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& needs) {
  return call<std::vector<at::Tensor>>(
      "batched_backward", grad_output, saved, activation, needs);
}

} // namespace batched

std::vector<at::Tensor> reference_backward(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& needs,
    const std::vector<at::Tensor>& grad_hidden) {
  const pybind11::gil_scoped_acquire gil;
  return call<std::vector<at::Tensor>>(
      "reference_backward", grad_output, saved, activation, needs,
      with_none(grad_hidden));
}

std::vector<at::Tensor> backward_vjp(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& needs,
    const std::vector<at::Tensor>& cotangents,
    const std::vector<bool>& requested) {
  const pybind11::gil_scoped_acquire gil;
  const auto gradients = call<pybind11::list>(
      "backward_vjp", grad_output, saved, activation, needs,
      with_none(cotangents), requested);
  std::vector<at::Tensor> result;
  for (const pybind11::handle gradient : gradients) {
    result.push_back(
        gradient.is_none() ? at::Tensor() : gradient.cast<at::Tensor>());
  }
  return result;
}

} // namespace relu_mlp::node::python
