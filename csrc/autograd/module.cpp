// relu_mlp._node: the functions that Python calls.
//
// Those that compute return NotImplemented for a call that Python has to serve.
#include <Python.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <dlfcn.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "batching.h"
#include "children.h"
#include "kernels.h"
#include "nodes.h"
#include "operators.h"
#include "python.h"
#include "training.h"

namespace relu_mlp::node {
namespace {

PyObject* not_implemented() {
  Py_INCREF(Py_NotImplemented);
  return Py_NotImplemented;
}

// Whether the nodes may look at this call: nothing but a transform is active in
// this thread that has to see the native layers.
bool may_serve() {
  return is_enabled &&
      (is_thread_plain() || is_thread_plain_but_for_transforms()) &&
      !at::impl::torch_function_mode_enabled() && is_backend_extension();
}

// A call with plain tensors, or with wrapped ones under a transform.
at::Tensor run(const Call& call) {
  if (is_under_a_transform()) {
    // Through the dispatcher, which runs one level after the other.
    return operators::relu_mlp(call);
  }
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
  if (is_under_a_transform()) {
    return is_plain_or_wrapped(tensor) ? &tensor : nullptr;
  }
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

// Whether a network has one dtype and device, as far as the first layer shows,
// and no tangents.
bool is_ordinary(const Call& call) {
  return (is_under_a_transform() || !call.any(carries_tangent)) &&
      call.x.device() == call.weights[0].device() &&
      call.x.scalar_type() == call.weights[0].scalar_type();
}

// call_module(module, input): the output of a ReluMLP.
PyObject* call_module(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 2 || !may_serve()) {
    return not_implemented();
  }
  const at::Tensor* x = plain_tensor(arguments[1]);
  if (!x || !serves_device(*x) || !is_dtype_served(x->scalar_type())) {
    return not_implemented();
  }
  std::optional<Call> call = network_of_children(arguments[0]);
  if (!call) {
    return not_implemented();
  }
  call->x = *x;
  if (!is_ordinary(*call)) {
    return not_implemented();
  }
  return run_without_gil(*call);
  END_HANDLE_TH_ERRORS
}

// call_run(module, position, input): the output of the run of two Linears or
// more that begins at a child of a FusedSequential, and the position after it;
// None if no run begins there.
PyObject* call_run(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 3 || !may_serve()) {
    return not_implemented();
  }
  const at::Tensor* x = plain_tensor(arguments[2]);
  if (!x || !serves_device(*x) || !is_dtype_served(x->scalar_type())) {
    return not_implemented();
  }
  auto run = run_of_children(arguments[0], PyLong_AsSsize_t(arguments[1]));
  if (!run) {
    return not_implemented();
  }
  auto& [call, end] = *run;
  if (call.weights.size() < 2) {
    Py_RETURN_NONE;
  }
  call.x = *x;
  if (!is_ordinary(call)) {
    return not_implemented();
  }
  return Py_BuildValue("(Nn)", run_without_gil(call), end);
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

// -- The operators, called from Python without a graph -------------------------
//
// A compiled graph calls its operators like this. Each function's `self` is the
// Python function that serves all other calls.

bool is_idle() {
  return is_enabled && !at::GradMode::is_enabled() && is_thread_plain() &&
      !at::impl::torch_function_mode_enabled() && !is_observed();
}

// Fills `call` from (x, weights, biases, activation); false if Python has to.
bool read_call(PyObject* const* arguments, Py_ssize_t count, Call& call) {
  const at::Tensor* x = plain_tensor(arguments[0]);
  if (!x || !plain_tensors(arguments[1], call.weights) ||
      !plain_tensors(arguments[2], call.biases)) {
    return false;
  }
  call.x = *x;
  call.activation = "none";
  if (count > 3) {
    if (!PyUnicode_CheckExact(arguments[3])) {
      return false;
    }
    call.activation = PyUnicode_AsUTF8(arguments[3]);
  }
  return true;
}

PyObject* relu_mlp_operator(
    PyObject* self,
    PyObject* const* arguments,
    Py_ssize_t count,
    PyObject* names) {
  HANDLE_TH_ERRORS
  Call call;
  if (!names && (count == 3 || count == 4) && is_idle() &&
      read_call(arguments, count, call)) {
    std::optional<ForwardResult> result;
    {
      const pybind11::gil_scoped_release no_gil;
      result = direct_forward(call, false);
    }
    if (result) {
      return THPVariable_Wrap(std::move(result->y));
    }
  }
  return PyObject_Vectorcall(self, arguments, count, names);
  END_HANDLE_TH_ERRORS
}

PyObject* forward_operator(
    PyObject* self,
    PyObject* const* arguments,
    Py_ssize_t count,
    PyObject* names) {
  HANDLE_TH_ERRORS
  Call call;
  if (!names && count == 5 && is_idle() && read_call(arguments, count, call)) {
    const bool save_hidden = PyObject_IsTrue(arguments[4]) == 1;
    std::optional<ForwardResult> result;
    {
      const pybind11::gil_scoped_release no_gil;
      result = direct_forward(call, save_hidden);
    }
    if (result) {
      return Py_BuildValue(
          "(NN)", THPVariable_Wrap(std::move(result->y)),
          THPVariable_WrapList(result->hidden));
    }
  }
  return PyObject_Vectorcall(self, arguments, count, names);
  END_HANDLE_TH_ERRORS
}

PyObject* backward_operator(
    PyObject* self,
    PyObject* const* arguments,
    Py_ssize_t count,
    PyObject* names) {
  HANDLE_TH_ERRORS
  std::vector<at::Tensor> saved;
  if (!names && count == 4 && is_idle() && plain_tensors(arguments[1], saved) &&
      PyUnicode_CheckExact(arguments[2]) &&
      PyUnicode_CheckExact(arguments[3])) {
    const at::Tensor* grad_output = plain_tensor(arguments[0]);
    const std::string activation = PyUnicode_AsUTF8(arguments[2]);
    const std::string needs = PyUnicode_AsUTF8(arguments[3]);
    std::optional<Gradients> gradients;
    if (grad_output && is_needs(needs)) {
      const pybind11::gil_scoped_release no_gil;
      gradients = direct_backward(*grad_output, saved, activation, needs, {});
    }
    if (gradients) {
      std::erase_if(
          *gradients, [](const at::Tensor& grad) { return !grad.defined(); });
      return THPVariable_WrapList(*gradients);
    }
  }
  return PyObject_Vectorcall(self, arguments, count, names);
  END_HANDLE_TH_ERRORS
}

template <auto function>
PyMethodDef method_of(const char* name) {
  return {
      name,
      reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
      METH_FASTCALL | METH_KEYWORDS, nullptr};
}

// operator(name, other): what calls the operator of this name, or `other`.
PyObject* operator_of(PyObject*, PyObject* arguments) {
  static PyMethodDef operators[] = {
      method_of<relu_mlp_operator>("relu_mlp"),
      method_of<forward_operator>("forward"),
      method_of<backward_operator>("backward")};
  const char* name = nullptr;
  PyObject* other = nullptr;
  if (!PyArg_ParseTuple(arguments, "sO", &name, &other)) {
    return nullptr;
  }
  for (PyMethodDef& definition : operators) {
    if (std::string_view(name) == definition.ml_name) {
      return PyCFunction_New(&definition, other);
    }
  }
  PyErr_Format(PyExc_ValueError, "there is no operator %s", name);
  return nullptr;
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
  if (python::has_batching_rules()) {
    register_batching_rules();
  }
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
    {"operator", operator_of, METH_VARARGS, nullptr},
    {"serve",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(serve)),
     METH_FASTCALL, nullptr},
    {"call_module",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_module)),
     METH_FASTCALL, nullptr},
    {"call_run",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_run)),
     METH_FASTCALL, nullptr},
    {"relu_mlp",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_function)),
     METH_FASTCALL, nullptr},
    {"new_step", new_step, METH_O, nullptr},
    {"train_step",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(train_step)),
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
