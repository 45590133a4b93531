// relu_mlp._node: the functions that Python calls.
//
// Those that compute return NotImplemented for a call that Python has to serve.
#include <Python.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <dlfcn.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "children.h"
#include "kernels.h"
#include "nodes.h"
#include "operators.h"
#include "python.h"

namespace relu_mlp::node {
namespace {

PyObject* not_implemented() {
  Py_INCREF(Py_NotImplemented);
  return Py_NotImplemented;
}

// Whether the nodes may look at this call: nothing is active in this thread
// that PyTorch's dispatcher has to serve, or that has to see the native layers.
bool may_serve() {
  return is_enabled && is_thread_plain() &&
      !at::impl::torch_function_mode_enabled() && is_backend_extension();
}

// A call with plain tensors.
at::Tensor run(const Call& call) {
  if (needs_gradient(call)) {
    return recorded_relu_mlp(call);
  }
  if (!is_observed()) {
    if (auto result = direct_forward(call, false)) {
      return std::move(result->y);
    }
  }
  const at::AutoDispatchBelowAutograd guard;
  return operators::relu_mlp(call);
}

PyObject* run_without_gil(const Call& call) {
  at::Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    y = run(call);
  }
  return THPVariable_Wrap(std::move(y));
}

const at::Tensor* plain_tensor(PyObject* object) {
  if (!THPVariable_CheckExact(object)) {
    return nullptr;
  }
  const at::Tensor& tensor = THPVariable_Unpack(object);
  return is_plain(tensor) && !carries_tangent(tensor) ? &tensor : nullptr;
}

bool plain_tensors(PyObject* list, std::vector<at::Tensor>& tensors) {
  if (!PyList_CheckExact(list) && !PyTuple_CheckExact(list)) {
    return false;
  }
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(list);
  tensors.reserve(count);
  for (Py_ssize_t n = 0; n < count; ++n) {
    const at::Tensor* tensor = plain_tensor(PySequence_Fast_GET_ITEM(list, n));
    if (!tensor) {
      return false;
    }
    tensors.push_back(*tensor);
  }
  return true;
}

// call_module(module, input): the output of a ReluMLP.
PyObject* call_module(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 2 || !may_serve()) {
    return not_implemented();
  }
  const at::Tensor* x = plain_tensor(arguments[1]);
  if (!x || !serves_device(*x)) {
    return not_implemented();
  }
  std::optional<Call> call = network_of_children(arguments[0]);
  if (!call) {
    return not_implemented();
  }
  call->x = *x;
  if (call->any(carries_tangent) || x->device() != call->weights[0].device() ||
      x->scalar_type() != call->weights[0].scalar_type()) {
    return not_implemented();
  }
  return run_without_gil(*call);
  END_HANDLE_TH_ERRORS
}

// relu_mlp(x, weights, biases, activation, recompute).
PyObject* call_function(
    PyObject*,
    PyObject* const* arguments,
    Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 5 || !may_serve()) {
    return not_implemented();
  }
  Call call;
  const at::Tensor* x = plain_tensor(arguments[0]);
  if (!x || !serves_device(*x) || !plain_tensors(arguments[1], call.weights) ||
      !plain_tensors(arguments[2], call.biases)) {
    return not_implemented();
  }
  call.x = *x;
  call.activation = PyUnicode_AsUTF8(arguments[3]);
  call.recompute = PyObject_IsTrue(arguments[4]) == 1;
  return run_without_gil(call);
  END_HANDLE_TH_ERRORS
}

// connect(path): connects this library with the extension at `path`. Returns
// None, or the reason why they do not fit.
PyObject* connect(PyObject*, PyObject* path_object) {
  HANDLE_TH_ERRORS
  const char* path = PyUnicode_AsUTF8(path_object);
  if (!path) {
    return nullptr;
  }
  void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  const auto get = library
      ? reinterpret_cast<const Direct* (*)()>(dlsym(library, "relu_mlp_direct"))
      : nullptr;
  if (!get || get()->layout() != direct_layout()) {
    return PyUnicode_FromFormat(
        "%s was compiled from other sources or by another compiler", path);
  }
  direct = get();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// serve(known, kernels): from now on the nodes serve the operators' calls.
// `known` is what children.h compares with, `kernels` the Python kernels.
PyObject* serve(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "serve takes 2 arguments");
    return nullptr;
  }
  if (!set_known(arguments[0])) {
    return nullptr;
  }
  python::set_kernels(arguments[1]);
  register_kernels();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// enable(flag): whether the nodes serve calls. Returns whether they did.
PyObject* enable(PyObject*, PyObject* flag) {
  const bool before = is_enabled;
  is_enabled = PyObject_IsTrue(flag) == 1;
  return PyBool_FromLong(before);
}

PyMethodDef methods[] = {
    {"connect", connect, METH_O, nullptr},
    {"serve",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(serve)),
     METH_FASTCALL, nullptr},
    {"call_module",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_module)),
     METH_FASTCALL, nullptr},
    {"relu_mlp",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_function)),
     METH_FASTCALL, nullptr},
    {"enable", enable, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "relu_mlp._node",
    nullptr, // documentation
    -1, // no state of an interpreter's own
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr};

} // namespace
} // namespace relu_mlp::node

PyMODINIT_FUNC PyInit__node() {
  return PyModule_Create(&relu_mlp::node::definition);
}
