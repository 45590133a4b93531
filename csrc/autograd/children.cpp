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
  PyObject* are_layers_replaced;
  bool has_cuda; // whether the extension has kernels for CUDA
  std::vector<PyObject*> hooks; // keys of a module's dict; its values are empty
  std::vector<PyObject*> overrides; // keys that a module's dict has not
  std::vector<PyObject*> global_hooks; // dicts that are empty
  Originals layers;
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
const at::Tensor* parameter(PyObject* parameters, PyObject* name) {
  PyObject* object = PyDict_GetItemWithError(parameters, name);
  if (!object || !THPVariable_CheckExact(object)) {
    return nullptr;
  }
  const at::Tensor& tensor = THPVariable_Unpack(object);
  return is_plain(tensor) ? &tensor : nullptr;
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
  result->hooks = items("hooks");
  result->overrides = items("overrides");
  result->global_hooks = items("global_hooks");
  if (PyObject* layers = get("layers"); is_complete) {
    result->layers = originals(layers);
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

std::optional<Call> network_of_children(PyObject* module) {
  if (!known) {
    return std::nullopt;
  }
  PyObject* iterate = PyObject_GetAttr(
      reinterpret_cast<PyObject*>(Py_TYPE(module)), known->iter);
  Py_XDECREF(iterate); // a class attribute, which the class keeps
  const Dict state(module);
  if (iterate != known->iterate || !state.dict) {
    PyErr_Clear();
    return std::nullopt;
  }
  PyObject* children = PyDict_GetItemWithError(state.dict, known->modules);
  if (!children || !PyDict_CheckExact(children) || !are_layers_original()) {
    return std::nullopt;
  }
  Call call;
  call.activation = "none";
  const Py_ssize_t count = PyDict_GET_SIZE(children);
  call.weights.reserve((count + 1) / 2);
  call.biases.reserve((count + 1) / 2);
  bool has_bias = false;
  Py_ssize_t position = 0, n = 0;
  PyObject *key, *child;
  while (PyDict_Next(children, &position, &key, &child)) {
    const Dict own(child);
    if (!own.dict || !is_unchanged(own.dict)) {
      return std::nullopt;
    }
    PyTypeObject* type = Py_TYPE(child);
    if (n++ % 2 == 0) {
      PyObject* parameters =
          PyDict_GetItemWithError(own.dict, known->parameters);
      if (type != known->linear || !parameters ||
          !PyDict_CheckExact(parameters)) {
        return std::nullopt;
      }
      const at::Tensor* weight = parameter(parameters, known->weight);
      if (!weight) {
        return std::nullopt;
      }
      call.weights.push_back(*weight);
      if (PyDict_GetItemWithError(parameters, known->bias) == Py_None) {
        static const at::Tensor missing(at::detail::empty_cpu({0}, at::kFloat));
        call.biases.push_back(missing);
      } else if (const at::Tensor* bias = parameter(parameters, known->bias);
                 bias && bias->numel() > 0) {
        call.biases.push_back(*bias);
        has_bias = true;
      } else {
        return std::nullopt;
      }
      call.activation = "none";
    } else if (type == known->relu) {
      call.activation = "relu";
    } else {
      const OutputActivation* found = nullptr;
      for (const OutputActivation& candidate : known->output_activations) {
        found = candidate.type == type ? &candidate : found;
      }
      if (!found || n < count || !found->originals.are_in_place()) {
        return std::nullopt;
      }
      call.activation = found->name;
    }
  }
  if (call.weights.empty()) {
    return std::nullopt;
  }
  if (!has_bias) {
    call.biases.clear();
  }
  PyObject* recompute = PyObject_GetAttr(module, known->recompute);
  if (!recompute) {
    PyErr_Clear();
    return std::nullopt;
  }
  call.recompute = PyObject_IsTrue(recompute) == 1;
  Py_DECREF(recompute);
  return call;
}

} // namespace relu_mlp::node
