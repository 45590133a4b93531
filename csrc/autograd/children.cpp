#include "children.h"

#include <ATen/EmptyTensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

namespace relu_mlp::node {
namespace {

// An attribute of a class or a module that PyTorch defines, as it was when the
// package was imported.
struct Attribute {
  PyObject* owner;
  PyObject* name;
  PyObject* value;
};

// Attributes that are as they were, and classes that have got no others.
struct Originals {
  std::vector<Attribute> attributes;
  std::vector<std::pair<PyTypeObject*, Py_ssize_t>> counts;

  bool are_in_place() const;
};

struct OutputActivation {
  PyTypeObject* type;
  std::string name;
  Originals originals;
};

// All objects live as long as the process.
struct Known {
  PyTypeObject *linear, *relu;
  PyObject *modules, *parameters, *weight, *bias, *recompute; // names
  PyObject *iter, *iterate; // Sequential.__iter__
  PyObject *thread, *backend; // thread.backend is the name of the backend
  PyObject *automatic, *extension; // the names of backends
  PyObject *are_layers_replaced, *is_output_activation_replaced; // functions
  bool has_cuda; // whether the extension has kernels for CUDA
  std::vector<PyObject*> hooks; // keys of a module's dict; its values are empty
  std::vector<PyObject*> overrides; // keys that a module's dict has not
  std::vector<PyObject*> global_hooks; // dicts that are empty
  PyTypeObject *identity, *dropout;
  PyObject *p, *training; // names
  Originals layers, identity_originals, dropout_originals;
  std::vector<OutputActivation> output_activations;
};

Known* known = nullptr;

PyObject* dict_of(PyObject* owner) { // borrowed
  return PyModule_Check(owner)
      ? PyModule_GetDict(owner)
      : reinterpret_cast<PyTypeObject*>(owner)->tp_dict;
}

bool Originals::are_in_place() const {
  for (const Attribute& attribute : attributes) {
    if (PyDict_GetItemWithError(dict_of(attribute.owner), attribute.name) !=
        attribute.value) {
      return false;
    }
  }
  for (const auto& [type, count] : counts) {
    if (PyDict_Size(type->tp_dict) != count) {
      return false;
    }
  }
  return true;
}

// Whether a call of the layers does what PyTorch defines. If something has
// changed, Python says whether it matters.
bool are_layers_original() {
  for (PyObject* hooks : known->global_hooks) {
    if (!PyDict_Check(hooks) || PyDict_GET_SIZE(hooks) != 0) {
      return false;
    }
  }
  if (known->layers.are_in_place()) {
    return true;
  }
  PyObject* replaced = PyObject_CallNoArgs(known->are_layers_replaced);
  const bool are_original = replaced == Py_False;
  Py_XDECREF(replaced);
  PyErr_Clear();
  return are_original;
}

// Whether a module has no hooks and no attribute that changes a call.
bool is_unchanged(PyObject* dict) {
  for (PyObject* key : known->hooks) {
    PyObject* hooks = PyDict_GetItemWithError(dict, key);
    if (!hooks || !PyDict_Check(hooks) || PyDict_GET_SIZE(hooks) != 0) {
      return false;
    }
  }
  for (PyObject* key : known->overrides) {
    if (PyDict_GetItemWithError(dict, key)) {
      return false;
    }
  }
  return true;
}

// A parameter of a plain type and layout.
const at::Tensor* parameter(
    PyObject* parameters,
    PyObject* name,
    bool is_transformed) {
  PyObject* object = PyDict_GetItemWithError(parameters, name);
  if (!object || !THPVariable_CheckExact(object)) {
    return nullptr;
  }
  const at::Tensor& tensor = THPVariable_Unpack(object);
  return (is_transformed ? is_plain_or_wrapped(tensor) : is_plain(tensor))
      ? &tensor
      : nullptr;
}

// The dict of an object; `owner` keeps it.
struct Dict {
  explicit Dict(PyObject* object)
      : dict(PyObject_GenericGetDict(object, nullptr)) {
    if (!dict) {
      PyErr_Clear();
    }
  }
  Dict(const Dict&) = delete;
  ~Dict() {
    Py_XDECREF(dict);
  }
  PyObject* const dict;
};

} // namespace

bool set_known(PyObject* given) {
  auto* result = new Known;
  bool is_complete = true;
  const auto get = [&](const char* key) {
    PyObject* value = PyDict_GetItemString(given, key);
    if (!value) {
      PyErr_Format(PyExc_KeyError, "%s", key);
      is_complete = false;
      return Py_None;
    }
    Py_INCREF(value);
    return value;
  };
  const auto items_of = [](PyObject* tuple) {
    std::vector<PyObject*> items;
    for (Py_ssize_t n = 0; PyTuple_Check(tuple) && n < PyTuple_GET_SIZE(tuple);
         ++n) {
      items.push_back(PyTuple_GET_ITEM(tuple, n));
    }
    return items;
  };
  const auto items = [&](const char* key) { return items_of(get(key)); };
  // (((owner, name, value), ...), (class, ...))
  const auto originals = [&](PyObject* pair) {
    Originals found;
    for (PyObject* entry : items_of(PyTuple_GET_ITEM(pair, 0))) {
      found.attributes.push_back(
          {PyTuple_GET_ITEM(entry, 0), PyTuple_GET_ITEM(entry, 1),
           PyTuple_GET_ITEM(entry, 2)});
    }
    for (PyObject* entry : items_of(PyTuple_GET_ITEM(pair, 1))) {
      auto* type = reinterpret_cast<PyTypeObject*>(entry);
      found.counts.emplace_back(type, PyDict_Size(type->tp_dict));
    }
    return found;
  };
  result->linear = reinterpret_cast<PyTypeObject*>(get("linear"));
  result->relu = reinterpret_cast<PyTypeObject*>(get("relu"));
  result->modules = get("modules");
  result->parameters = get("parameters");
  result->weight = get("weight");
  result->bias = get("bias");
  result->recompute = get("recompute");
  result->iter = get("iter");
  result->iterate = get("iterate");
  result->thread = get("thread");
  result->backend = get("backend");
  result->automatic = get("automatic");
  result->extension = get("extension");
  result->has_cuda = get("has_cuda") == Py_True;
  result->are_layers_replaced = get("are_layers_replaced");
  result->is_output_activation_replaced = get("is_output_activation_replaced");
  result->hooks = items("hooks");
  result->overrides = items("overrides");
  result->global_hooks = items("global_hooks");
  if (PyObject* layers = get("layers"); is_complete) {
    result->layers = originals(layers);
  }
  result->identity = reinterpret_cast<PyTypeObject*>(get("identity"));
  result->dropout = reinterpret_cast<PyTypeObject*>(get("dropout"));
  result->p = get("p");
  result->training = get("training");
  if (PyObject* originals_of = get("identity_originals"); is_complete) {
    result->identity_originals = originals(originals_of);
  }
  if (PyObject* originals_of = get("dropout_originals"); is_complete) {
    result->dropout_originals = originals(originals_of);
  }
  for (PyObject* entry : items("output_activations")) {
    result->output_activations.push_back(
        {reinterpret_cast<PyTypeObject*>(PyTuple_GET_ITEM(entry, 0)),
         PyUnicode_AsUTF8(PyTuple_GET_ITEM(entry, 1)),
         originals(PyTuple_GET_ITEM(entry, 2))});
  }
  if (!is_complete) {
    delete result;
    return false;
  }
  known = result; // the last one stays: another thread may be using it
  return true;
}

bool serves_device(const at::Tensor& x) {
  return x.is_cpu() || (x.is_cuda() && known && known->has_cuda);
}

bool is_backend_extension() {
  if (!known) {
    return false;
  }
  PyObject* name = PyObject_GetAttr(known->thread, known->backend);
  if (!name) {
    PyErr_Clear();
    return false;
  }
  const bool is_extension = name == known->automatic ||
      name == known->extension ||
      PyUnicode_Compare(name, known->automatic) == 0 ||
      PyUnicode_Compare(name, known->extension) == 0;
  Py_DECREF(name);
  return is_extension;
}

namespace {

// Children that are one network, from `start` on.
struct Run {
  Call call;
  Py_ssize_t end; // the position after the last one
  // Whether relu_mlp/run.py would find the same. It looks closer at children
  // that this file does not know.
  bool is_certain = true;
};

// Whether a class that was changed may compute something else. A class may also
// get attributes that do not matter; Python decides.
bool is_changed(PyTypeObject* type) {
  if (type == known->identity) {
    return !known->identity_originals.are_in_place();
  }
  if (type == known->dropout) {
    return !known->dropout_originals.are_in_place();
  }
  for (const OutputActivation& candidate : known->output_activations) {
    if (candidate.type == type && !candidate.originals.are_in_place()) {
      PyObject* replaced = PyObject_CallOneArg(
          known->is_output_activation_replaced,
          reinterpret_cast<PyObject*>(type));
      const bool is_original = replaced == Py_False;
      Py_XDECREF(replaced);
      PyErr_Clear();
      return !is_original;
    }
  }
  return false;
}

// Whether a call of a child returns its input (fusion/conditions.py:
// does_nothing): Identity, and Dropout in eval mode or with p = 0.
bool does_nothing(PyTypeObject* type, PyObject* dict) {
  PyObject* p = PyDict_GetItemWithError(dict, known->p);
  PyObject* training = PyDict_GetItemWithError(dict, known->training);
  if (type != known->dropout || !p || !training) {
    return type == known->identity;
  }
  const double rate = PyFloat_AsDouble(p);
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  const bool drops = PyObject_IsTrue(training) != 0 && rate != 0;
  return !drops && rate >= 0 && rate <= 1; // otherwise the call raises
}

// The output activation that a child computes; null if none.
const std::string* activation_of(PyTypeObject* type) {
  static const std::string relu = "relu";
  if (type == known->relu) {
    return &relu;
  }
  for (const OutputActivation& candidate : known->output_activations) {
    if (candidate.type == type) {
      return &candidate.name;
    }
  }
  return nullptr;
}

// Adds the parameters of a Linear. Returns false for those that Python has to
// look at.
bool add_parameters(PyObject* parameters, Call& call) {
  if (!parameters || !PyDict_CheckExact(parameters)) {
    return false;
  }
  static const at::Tensor missing = [] {
    const c10::InferenceMode guard(false); // so that it can be saved
    return at::Tensor(at::detail::empty_cpu({0}, at::kFloat));
  }();
  const bool is_transformed = is_under_a_transform();
  const at::Tensor* weight =
      parameter(parameters, known->weight, is_transformed);
  const at::Tensor* bias =
      PyDict_GetItemWithError(parameters, known->bias) == Py_None
      ? &missing
      : parameter(parameters, known->bias, is_transformed);
  if (!weight || !bias || (bias != &missing && bias->numel() == 0)) {
    return false;
  }
  call.weights.push_back(*weight);
  call.biases.push_back(*bias);
  return true;
}

// The longest run that begins at `start`. `skips` is whether children that do
// nothing may be in it.
Run run_at(PyObject* children, Py_ssize_t start, bool skips) {
  Run run{{}, start};
  run.call.activation = "none";
  bool after_linear = false, has_bias = false;
  Py_ssize_t position = 0, n = -1;
  PyObject *key, *child;
  while (PyDict_Next(children, &position, &key, &child)) {
    if (++n < start) {
      continue;
    }
    const Dict own(child);
    if (!own.dict || !is_unchanged(own.dict)) {
      break;
    }
    PyTypeObject* type = Py_TYPE(child);
    if (is_changed(type)) {
      run.is_certain = false;
      break;
    }
    if (skips && does_nothing(type, own.dict)) {
      continue;
    }
    if (!after_linear) {
      if (type != known->linear) {
        break;
      }
      if (!add_parameters(
              PyDict_GetItemWithError(own.dict, known->parameters), run.call)) {
        run.is_certain = false;
        break;
      }
      has_bias = has_bias || run.call.biases.back().numel() > 0;
      run.call.activation = "none";
    } else {
      const std::string* activation = activation_of(type);
      if (!activation) {
        break;
      }
      run.call.activation = *activation;
    }
    run.end = n + 1;
    after_linear = !after_linear;
    if (!after_linear && type != known->relu) {
      break; // nothing can follow in the same run
    }
  }
  if (!has_bias) {
    run.call.biases.clear();
  }
  return run;
}

// The children of a module; null if iterating over it does anything else, or
// if the layers have been changed.
PyObject* children_of(PyObject* module) {
  PyObject* iterate = PyObject_GetAttr(
      reinterpret_cast<PyObject*>(Py_TYPE(module)), known->iter);
  Py_XDECREF(iterate); // a class attribute, which the class keeps
  const Dict state(module);
  if (iterate != known->iterate || !state.dict) {
    PyErr_Clear();
    return nullptr;
  }
  PyObject* children = PyDict_GetItemWithError(state.dict, known->modules);
  return children && PyDict_CheckExact(children) && are_layers_original()
      ? children
      : nullptr;
}

} // namespace

bool is_module_unchanged(PyObject* module) {
  const Dict own(module);
  return known && own.dict && is_unchanged(own.dict);
}

std::optional<Call> network_of_children(PyObject* module) {
  PyObject* children = known ? children_of(module) : nullptr;
  if (!children) {
    return std::nullopt;
  }
  Run run = run_at(children, 0, false);
  PyObject* recompute = PyObject_GetAttr(module, known->recompute);
  if (!recompute || run.call.weights.empty() ||
      run.end < PyDict_GET_SIZE(children)) {
    PyErr_Clear();
    Py_XDECREF(recompute);
    return std::nullopt;
  }
  run.call.recompute = PyObject_IsTrue(recompute) == 1;
  Py_DECREF(recompute);
  return std::move(run.call);
}

std::optional<std::pair<Call, Py_ssize_t>> run_of_children(
    PyObject* module,
    Py_ssize_t start) {
  PyObject* children = known ? children_of(module) : nullptr;
  if (!children) {
    return std::nullopt;
  }
  Run run = run_at(children, start, true);
  if (!run.is_certain) {
    return std::nullopt;
  }
  return std::pair(std::move(run.call), run.end);
}

} // namespace relu_mlp::node
