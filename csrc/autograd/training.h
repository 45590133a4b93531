// The step of TrainingStep (relu_mlp/training.py): whether all is as it was at
// the step before, and the call of the CPU's training, without the dispatcher.
//
// For a small network, checking in Python takes longer than training.
#pragma once

#include <Python.h>

namespace relu_mlp::node {

// new_step(dict): an object for `train_step`, from what trainer.py knows of a
// network and its optimizer.
PyObject* new_step(PyObject* self, PyObject* known);

// train_step(steps, x, target, max_norm, is_single): the loss of every network
// before a step on all rows, (networks,), or () if there is a single one;
// NotImplemented if Python has to look closer. Nothing has changed then.
PyObject* train_step(
    PyObject* self,
    PyObject* const* arguments,
    Py_ssize_t count);

} // namespace relu_mlp::node
