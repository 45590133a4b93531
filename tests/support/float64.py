"""Compares a call and its backward pass with float64, within the bounds of bounds.py."""

import torch

from relu_mlp import ops, reference, relu_mlp

from .bounds import Exact, hidden_of
from .networks import make_network


def compare_with_float64(sizes, rows, bias, activation, dtype, backend, leading=None):
    weights, biases = make_network(sizes, bias, dtype, requires_grad=True)
    x = torch.randn(*(leading or [rows]), sizes[0], dtype=torch.float64).to(dtype).requires_grad_()
    y = relu_mlp(x, weights, biases, output_activation=activation)
    grad_output = torch.randn_like(y)
    y.backward(grad_output)

    assert y.dtype == dtype and y.is_contiguous()
    implementation = ops.extension if backend == "extension" else reference
    rows_of_x = x.detach().reshape(-1, sizes[0])
    _, hidden = hidden_of(implementation, rows_of_x, weights, biases, activation)
    exact = Exact(rows_of_x, weights, biases, activation, hidden, y)
    exact.y.check(y.detach().reshape(-1, sizes[-1]), "y")
    grads = exact.backward(grad_output)
    grads["x"].check(x.grad.reshape(-1, sizes[0]), "x.grad")
    for layer, weight in enumerate(weights):
        grads[f"weights[{layer}]"].check(weight.grad, f"weights[{layer}].grad")
        if biases and biases[layer] is not None:
            grads[f"biases[{layer}]"].check(biases[layer].grad, f"biases[{layer}].grad")
    return x, weights, biases, y, grad_output
