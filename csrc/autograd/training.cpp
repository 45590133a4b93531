#include "training.h"

#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "call.h"
#include "children.h"
#include "direct_passes.h"
#include "kernels.h"

namespace relu_mlp::node {
namespace {

// The state that an optimizer keeps of a parameter: a dict, and the tensors that
// were in it.
struct State {
  PyObject *parameter, *dict;
  std::vector<std::pair<PyObject*, PyObject*>> tensors; // by name
};

struct Step {
  pybind11::dict known; // keeps all objects below alive
  PyObject *module, *type, *optimizer_dict, *groups, *states;
  std::string activation;
  int64_t number; // of the trainer
  std::vector<PyObject*> parameters; // weights, then biases
  std::vector<at::Tensor> tensors; // the same
  std::vector<bool> requires_grad;
  std::vector<std::vector<PyObject*>> members; // of every group
  std::vector<bool> flags; // of every group: the value of `flag`
  std::vector<PyObject*> hyperparameters; // keys of a group
  PyObject *flag, *params, *param_groups, *state; // keys
  std::vector<PyObject*> off; // keys of a group whose values are false
  std::vector<PyObject*> hooks; // keys of the optimizer whose dicts are empty
  std::vector<PyObject*> global_hooks; // dicts that are empty
  std::vector<PyObject*> absent; // keys that the optimizer has not
  struct Method {
    PyObject *type, *name, *value;
  };
  std::vector<Method> methods; // of the optimizer's class
  std::vector<State> taken;
  std::vector<at::Tensor> changed; // by a step
};

constexpr const char* capsule_name = "relu_mlp._node.step";

std::vector<PyObject*> items_of(PyObject* sequence) {
  PyObject** const items = PySequence_Fast_ITEMS(sequence);
  return {items, items + PySequence_Fast_GET_SIZE(sequence)};
}

std::vector<at::Tensor> tensors_of(PyObject* sequence) {
  std::vector<at::Tensor> tensors;
  for (PyObject* item : items_of(sequence)) {
    tensors.push_back(THPVariable_Unpack(item));
  }
  return tensors;
}

bool are_same(PyObject* list, const std::vector<PyObject*>& expected) {
  if (!list || !PyList_CheckExact(list) ||
      PyList_GET_SIZE(list) != Py_ssize_t(expected.size())) {
    return false;
  }
  for (std::size_t n = 0; n < expected.size(); ++n) {
    if (PyList_GET_ITEM(list, n) != expected[n]) {
      return false;
    }
  }
  return true;
}

bool is_empty_dict(PyObject* dict) {
  return dict && PyDict_Check(dict) && PyDict_GET_SIZE(dict) == 0;
}

// Adds a hyperparameter, or the items of a tuple. Returns false for anything but
// Python's own numbers.
bool add_number(PyObject* value, std::vector<double>& numbers) {
  if (!value) {
    return false;
  }
  if (PyTuple_CheckExact(value)) {
    for (PyObject* item : items_of(value)) {
      if (!add_number(item, numbers)) {
        return false;
      }
    }
    return true;
  }
  if (PyFloat_Check(value)) {
    numbers.push_back(PyFloat_AS_DOUBLE(value));
    return true;
  }
  if (PyLong_Check(value)) {
    numbers.push_back(PyLong_AsDouble(value));
    return !PyErr_Occurred();
  }
  return false;
}

// Adds the hyperparameters. Returns false unless the groups have the members
// that they had, and nothing is on that Python has to see.
bool read_groups(const Step& step, std::vector<double>& numbers) {
  constexpr std::size_t numbers_of_a_group = 8;
  const std::size_t before = numbers.size();
  if (PyDict_GetItemWithError(step.optimizer_dict, step.param_groups) !=
          step.groups ||
      PyList_GET_SIZE(step.groups) != Py_ssize_t(step.members.size())) {
    return false;
  }
  for (std::size_t n = 0; n < step.members.size(); ++n) {
    PyObject* group = PyList_GET_ITEM(step.groups, n);
    if (!PyDict_CheckExact(group) ||
        !are_same(
            PyDict_GetItemWithError(group, step.params), step.members[n])) {
      return false;
    }
    for (PyObject* key : step.off) {
      PyObject* value = PyDict_GetItemWithError(group, key);
      if (value && PyObject_IsTrue(value) != 0) {
        return false;
      }
    }
    PyObject* flag = PyDict_GetItemWithError(group, step.flag);
    if (!flag || (PyObject_IsTrue(flag) == 1) != step.flags[n]) {
      return false;
    }
    for (PyObject* key : step.hyperparameters) {
      if (!add_number(PyDict_GetItemWithError(group, key), numbers)) {
        return false;
      }
    }
    numbers.resize(before + (n + 1) * numbers_of_a_group);
  }
  return true;
}

bool is_optimizer_changed(const Step& step) {
  for (PyObject* key : step.hooks) {
    if (!is_empty_dict(PyDict_GetItemWithError(step.optimizer_dict, key))) {
      return true;
    }
  }
  for (PyObject* dict : step.global_hooks) {
    if (!is_empty_dict(dict)) {
      return true;
    }
  }
  for (PyObject* key : step.absent) {
    if (PyDict_GetItemWithError(step.optimizer_dict, key)) {
      return true;
    }
  }
  for (const Step::Method& method : step.methods) {
    PyObject* now = PyObject_GetAttr(method.type, method.name);
    const bool is_same = now == method.value;
    Py_XDECREF(now);
    if (!is_same) {
      return true;
    }
  }
  return false;
}

bool is_state_unchanged(const Step& step) {
  if (PyDict_GetItemWithError(step.optimizer_dict, step.state) != step.states) {
    return false;
  }
  for (const State& taken : step.taken) {
    if (PyDict_GetItemWithError(step.states, taken.parameter) != taken.dict) {
      return false;
    }
    for (const auto& [name, tensor] : taken.tensors) {
      if (PyDict_GetItemWithError(taken.dict, name) != tensor) {
        return false;
      }
    }
  }
  return true;
}

// Whether a parameter has a hook that a backward pass would call.
bool has_hook(const at::Tensor& parameter) {
  using namespace torch::autograd;
  return impl::get_autograd_meta(parameter) &&
      (!impl::hooks(parameter).empty() || impl::post_acc_grad_hooks(parameter));
}

bool is_network_unchanged(const Step& step) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(step.module)) != step.type ||
      !is_module_unchanged(step.module)) {
    return false;
  }
  const std::optional<Call> call = network_of_children(step.module);
  if (!call || call->activation != step.activation ||
      step.tensors.size() != 2 * call->weights.size()) {
    return false;
  }
  const std::size_t layers = call->weights.size();
  for (std::size_t n = 0; n < 2 * layers; ++n) {
    const at::Tensor& expected = step.tensors[n];
    if (n >= layers && call->biases.empty()) {
      if (expected.numel() > 0) {
        return false;
      }
      continue;
    }
    const at::Tensor& found =
        n < layers ? call->weights[n] : call->biases[n - layers];
    const bool is_same =
        found.is_same(expected) || found.numel() + expected.numel() == 0;
    if (!is_same || !expected.is_contiguous() || !expected.is_cpu() ||
        expected.requires_grad() != step.requires_grad[n] ||
        has_hook(expected)) {
      return false;
    }
    for (std::size_t other = 0; other < n; ++other) { // in the same memory
      if (expected.numel() > 0 &&
          step.tensors[other].data_ptr() == expected.data_ptr()) {
        return false;
      }
    }
  }
  return true;
}

const Step* step_of(PyObject* capsule) {
  return static_cast<const Step*>(PyCapsule_GetPointer(capsule, capsule_name));
}

// Whether what one network trains is another's too. Threads would disturb each
// other.
bool share_memory(const std::vector<PyObject*>& capsules) {
  std::vector<std::pair<const void*, std::size_t>> owners;
  for (std::size_t n = 0; n < capsules.size(); ++n) {
    const Step& step = *step_of(capsules[n]);
    for (const std::vector<at::Tensor>* tensors :
         {&step.tensors, &step.changed}) {
      for (const at::Tensor& tensor : *tensors) {
        if (tensor.numel() > 0) {
          owners.emplace_back(tensor.const_data_ptr(), n);
        }
      }
    }
  }
  std::sort(owners.begin(), owners.end());
  return std::adjacent_find(
             owners.begin(), owners.end(), [](const auto& a, const auto& b) {
               return a.first == b.first && a.second != b.second;
             }) != owners.end();
}

// A contiguous tensor of the CPU that needs no gradient, or null.
const at::Tensor* data(PyObject* object) {
  if (!THPVariable_CheckExact(object)) {
    return nullptr;
  }
  const at::Tensor& tensor = THPVariable_Unpack(object);
  return is_plain(tensor) && tensor.is_cpu() && tensor.is_contiguous() &&
          !tensor.requires_grad() && !carries_tangent(tensor)
      ? &tensor
      : nullptr;
}

// Whether x is (rows, features) and the target fits, both perhaps with a
// dimension for the networks in front. Python converts what has another shape
// or dtype.
bool have_usual_shapes(
    const at::Tensor& x,
    const at::Tensor& target,
    int64_t networks) {
  const auto has_dim = [networks](const at::Tensor& tensor, int64_t dim) {
    return tensor.dim() == dim ||
        (networks > 0 && tensor.dim() == dim + 1 && tensor.size(0) == networks);
  };
  const bool has_classes = target.scalar_type() == at::kLong;
  return (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble) &&
      (has_classes || target.scalar_type() == x.scalar_type()) &&
      has_dim(x, 2) && has_dim(target, has_classes ? 1 : 2);
}

// A new handle, which the callee owns.
AtenTensorHandle handle_of(const at::Tensor& tensor) {
  return torch::aot_inductor::new_tensor_handle(at::Tensor(tensor));
}

void delete_step(PyObject* capsule) {
  delete static_cast<Step*>(PyCapsule_GetPointer(capsule, capsule_name));
}

} // namespace

PyObject* new_step(PyObject*, PyObject* known) {
  HANDLE_TH_ERRORS
  auto step = std::make_unique<Step>();
  step->known = pybind11::reinterpret_borrow<pybind11::dict>(known);
  const auto get = [&](const char* key) {
    PyObject* value = PyDict_GetItemString(known, key);
    TORCH_CHECK(value, "there is no ", key);
    return value;
  };
  step->module = get("module");
  step->type = get("type");
  step->optimizer_dict = get("optimizer_dict");
  step->groups = get("groups");
  step->states = get("states");
  step->activation = PyUnicode_AsUTF8(get("activation"));
  step->number = PyLong_AsLongLong(get("number"));
  step->parameters = items_of(get("parameters"));
  step->tensors = tensors_of(get("parameters"));
  for (PyObject* flag : items_of(get("requires_grad"))) {
    step->requires_grad.push_back(flag == Py_True);
  }
  for (PyObject* members : items_of(get("members"))) {
    step->members.push_back(items_of(members));
  }
  for (PyObject* flag : items_of(get("flags"))) {
    step->flags.push_back(flag == Py_True);
  }
  step->hyperparameters = items_of(get("hyperparameters"));
  step->flag = get("flag");
  step->off = items_of(get("off"));
  step->hooks = items_of(get("hooks"));
  step->global_hooks = items_of(get("global_hooks"));
  const std::vector<PyObject*> names = items_of(get("names"));
  step->params = names.at(0);
  step->param_groups = names.at(1);
  step->state = names.at(2);
  step->absent = items_of(get("absent"));
  for (PyObject* method : items_of(get("methods"))) {
    const std::vector<PyObject*> parts = items_of(method);
    step->methods.push_back({parts.at(0), parts.at(1), parts.at(2)});
  }
  for (PyObject* entry : items_of(get("taken"))) {
    const std::vector<PyObject*> parts = items_of(entry);
    State state{parts.at(0), parts.at(1), {}};
    const std::vector<PyObject*> keys = items_of(parts.at(2)),
                                 tensors = items_of(parts.at(3));
    for (std::size_t n = 0; n < keys.size(); ++n) {
      state.tensors.emplace_back(keys[n], tensors.at(n));
    }
    step->taken.push_back(std::move(state));
  }
  step->changed = tensors_of(get("changed"));
  return PyCapsule_New(step.release(), capsule_name, delete_step);
  END_HANDLE_TH_ERRORS
}

PyObject* train_step(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const auto python = [] {
    PyErr_Clear();
    Py_INCREF(Py_NotImplemented);
    return Py_NotImplemented;
  };
  if (count != 5 || !direct || !is_enabled || !is_thread_plain() ||
      at::impl::torch_function_mode_enabled() || is_observed() ||
      torch::autograd::AnomalyMode::is_enabled() || !is_backend_extension()) {
    return python();
  }
  const std::vector<PyObject*> steps = items_of(arguments[0]);
  const at::Tensor *x = data(arguments[1]), *target = data(arguments[2]);
  const double max_norm = PyFloat_AsDouble(arguments[3]);
  const bool is_single = arguments[4] == Py_True;
  const int64_t networks = std::ssize(steps);
  if (!x || !target || PyErr_Occurred() ||
      !have_usual_shapes(*x, *target, is_single ? 0 : networks)) {
    return python();
  }
  std::vector<int64_t> trainers;
  std::vector<double> hyperparameters;
  for (PyObject* capsule : steps) {
    const Step* step = step_of(capsule);
    if (!step || !is_network_unchanged(*step) || is_optimizer_changed(*step) ||
        !is_state_unchanged(*step) || !read_groups(*step, hyperparameters)) {
      return python();
    }
    trainers.push_back(step->number);
  }
  if (networks > 1 && share_memory(steps)) {
    return python();
  }
  static const at::Tensor rows_in_place = [] {
    const c10::InferenceMode guard(false);
    return at::Tensor(at::detail::empty_cpu({0}, at::kLong));
  }();
  at::Tensor losses = at::detail::empty_cpu({networks, 1}, x->scalar_type());
  {
    const pybind11::gil_scoped_release no_gil;
    direct->train(
        trainers, handle_of(*x), handle_of(*target), handle_of(losses),
        handle_of(rows_in_place), hyperparameters, max_norm,
        std::max<int64_t>(1, x->size(-2)));
  }
  for (PyObject* capsule : steps) {
    const Step* step = step_of(capsule);
    for (const at::Tensor& tensor : step->changed) {
      torch::autograd::impl::bump_version(tensor);
    }
    for (const at::Tensor& parameter : step->tensors) {
      if (parameter.grad().defined()) {
        parameter.mutable_grad().reset();
      }
    }
  }
  // () or (networks,)
  const std::vector<int64_t> sizes(is_single ? 0 : 1, networks),
      strides(sizes.size(), 1);
  losses.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return THPVariable_Wrap(std::move(losses));
  END_HANDLE_TH_ERRORS
}

} // namespace relu_mlp::node
