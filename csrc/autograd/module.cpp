// A stand-in: the module that the build, the cache and the loader are written for.

#include <Python.h>

namespace {

PyObject* answer(PyObject*, PyObject*) {
  return PyLong_FromLong(42);
}

PyMethodDef functions[] = {{"answer", answer, METH_NOARGS, nullptr}, {}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_node", nullptr, -1, functions};

} // namespace

PyMODINIT_FUNC PyInit__node() {
  return PyModule_Create(&definition);
}
