// The Python kernels of relu_mlp/autograd.py, which serve what the nodes do
// not: tangents, the reference, and derivatives of third order.
#pragma once

#include <Python.h>

#include "call.h"

namespace relu_mlp::node::python {

// Replaces the functions below, by their names in a dict.
void set_kernels(PyObject* kernels);
bool has_batching_rules();

// Whether the backend that is in force in this thread is the extension, for
// tensors on the device of x.
bool is_extension_in_force(const at::Tensor& x);

// Puts the extension in force in this thread, as ops/backend.py: using does.
class UsingExtension {
 public:
  UsingExtension();
  UsingExtension(const UsingExtension&) = delete;
  ~UsingExtension();

 private:
  PyObject* outer_; // the name of the backend that was in force
};

at::Tensor relu_mlp(const Call& call);
std::tuple<at::Tensor, std::vector<at::Tensor>> forward(
    const Call& call,
    bool save_hidden);
std::vector<at::Tensor> backward(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& needs);

// The batching rules of relu_mlp/batching.py.
namespace batched {

at::Tensor relu_mlp(const Call& call);
std::tuple<at::Tensor, std::vector<at::Tensor>> forward(
    const Call& call,
    bool save_hidden);
std::vector<at::Tensor> backward(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& needs);

} // namespace batched

// reference.backward: with gradients that reach the hidden activations.
std::vector<at::Tensor> reference_backward(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& needs,
    const std::vector<at::Tensor>& grad_hidden);

// second_order.backward_vjp, for those gradients that are requested.
std::vector<at::Tensor> backward_vjp(
    const at::Tensor& grad_output,
    const std::vector<at::Tensor>& saved,
    const std::string& activation,
    const std::string& needs,
    const std::vector<at::Tensor>& cotangents,
    const std::vector<bool>& requested);

} // namespace relu_mlp::node::python
