// Reads a network from a module's children (relu_mlp/run.py: network_of).
#pragma once

#include <Python.h>

#include <optional>
#include <utility>

#include "call.h"

namespace relu_mlp::node {

// Sets what `network_of_children` compares with, from a dict that
// interception.py makes. Returns false, with a Python exception set, if an
// entry is missing.
bool set_known(PyObject* known);

// Whether a module has no hooks and no attribute that changes a call of it.
bool is_module_unchanged(PyObject* module);

// The weights, biases and activation of a module whose children are Linear,
// ReLU, ..., Linear and perhaps an output activation, and were not changed in
// any way; std::nullopt where Python has to look closer. Under a transform the
// parameters may be its wrappers.
std::optional<Call> network_of_children(PyObject* module);

// The run of children that begins at the position `start` (fusion/sequential.py:
// run_at), and the position after it; children that do nothing are left out.
// std::nullopt where Python has to look closer.
std::optional<std::pair<Call, Py_ssize_t>> run_of_children(
    PyObject* module,
    Py_ssize_t start);

// Whether the extension has kernels for the device of x.
bool serves_device(const at::Tensor& x);

// Whether the backend that is in force in this thread uses the extension.
bool is_backend_extension();

} // namespace relu_mlp::node
