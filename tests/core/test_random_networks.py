"""Values and every gradient, against float64 with bounds that are derived, and
against native autograd, over a few hundred random configurations."""

import random

import pytest
import torch

import support
from relu_mlp import ops, reference, relu_mlp

WIDTHS = [1, 2, 3, 6, 7, 16, 17, 42, 64, 123, 431]
ROWS = [1, 2, 3, 5, 16, 33, 64, 130, 431]


def random_case(seed):
    r = random.Random(seed)
    depth = r.randint(1, 5)
    sizes = [r.choice(WIDTHS) for _ in range(depth + 1)]
    return sizes, r.choice(ROWS), r.choice(["all", "none", "some"]), r.choice(support.ACTIVATIONS)


def compare(sizes, rows, bias, activation, dtype, backend, leading=None):
    weights, biases = support.make_network(sizes, bias, dtype, requires_grad=True)
    x = torch.randn(*(leading or [rows]), sizes[0], dtype=torch.float64).to(dtype).requires_grad_()
    y = relu_mlp(x, weights, biases, output_activation=activation)
    grad_output = torch.randn_like(y)
    y.backward(grad_output)

    assert y.dtype == dtype and y.is_contiguous()
    implementation = ops.extension if backend == "extension" else reference
    rows_of_x = x.detach().reshape(-1, sizes[0])
    _, hidden = support.hidden_of(implementation, rows_of_x, weights, biases, activation)
    exact = support.Exact(rows_of_x, weights, biases, activation, hidden, y)
    exact.y.check(y.detach().reshape(-1, sizes[-1]), "y")
    grads = exact.backward(grad_output)
    grads["x"].check(x.grad.reshape(-1, sizes[0]), "x.grad")
    for layer, weight in enumerate(weights):
        grads[f"weights[{layer}]"].check(weight.grad, f"weights[{layer}].grad")
        if biases and biases[layer] is not None:
            grads[f"biases[{layer}]"].check(biases[layer].grad, f"biases[{layer}].grad")
    return x, weights, biases, y, grad_output


@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(60))
def test_random_networks(backend, seed, dtype):
    torch.manual_seed(seed)
    sizes, rows, bias, activation = random_case(seed)
    compare(sizes, rows, bias, activation, dtype, backend)
