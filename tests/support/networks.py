"""Networks of functions and modules, with random numbers or integers, and their native versions."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

import relu_mlp
from relu_mlp import activations

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

#: All values of `output_activation`.
ACTIVATIONS = [None, *get_args(activations.OutputActivation)]

#: The activations whose PyTorch module saves y, and accepts integers. Other modules save z: then
#: the saved tensors differ, and y may be changed in place.
THAT_SAVE_Y = [None, "relu", "sigmoid", "tanh"]

#: The values of `bias` in the functions that make a network: biases for all layers, for none, or
#: for the layers 0, 2, 4, ...
BIASES = ["all", "none", "some"]


def native_mlp(x, weights, biases=None, output_activation=None, recompute=False):
    """The plain PyTorch that `relu_mlp.relu_mlp` equals."""
    for layer, weight in enumerate(weights):
        x = F.linear(x, weight, biases[layer] if biases else None)
        if layer < len(weights) - 1:
            x = F.relu(x)
    if output_activation is None:
        return x
    return attrgetter(activations.FUNCTIONS[output_activation])(torch)(x)


def make_network(sizes, bias="all", dtype=torch.float64, requires_grad=False, scale=1.0):
    """Weights and biases; `bias` is "all", "none" or "some" (those of odd layers are None)."""
    weights = [
        (scale * torch.randn(n_out, n_in, dtype=torch.float64) / max(1, n_in) ** 0.5)
        .to(dtype)
        .requires_grad_(requires_grad)
        for n_in, n_out in zip(sizes, sizes[1:])
    ]
    if bias == "none":
        return weights, None
    biases = [
        None
        if bias == "some" and layer % 2
        else torch.randn(n_out, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)
        for layer, n_out in enumerate(sizes[1:])
    ]
    return weights, biases


def integers(*shape, dtype=torch.float64, largest=2):
    return torch.randint(-largest, largest + 1, shape, dtype=dtype)


def integer_network(sizes, bias="all", dtype=torch.float64, requires_grad=True, largest=2):
    """Weights and biases; `bias` is "all", "none" or "some" (those of odd layers are None)."""
    pairs = list(zip(sizes, sizes[1:]))
    weights = [
        integers(n_out, n_in, dtype=dtype, largest=largest).requires_grad_(requires_grad)
        for n_in, n_out in pairs
    ]
    if bias == "none":
        return weights, None
    return weights, [
        None
        if bias == "some" and layer % 2
        else integers(n_out, dtype=dtype, largest=largest).requires_grad_(requires_grad)
        for layer, (_, n_out) in enumerate(pairs)
    ]


def _sizes(leading):
    return (leading,) if isinstance(leading, int) else leading


def make_case(sizes, leading=5, bias="all", dtype=torch.float64):
    """x (*leading, in_features), weights and biases; `leading` may be a number of rows."""
    weights, biases = make_network(sizes, bias, dtype)
    return torch.randn(*_sizes(leading), sizes[0], dtype=torch.float64).to(dtype), weights, biases


def make_case_with_target(sizes, leading=5, bias="all", dtype=torch.float64):
    """x (*leading, in_features), target (*leading, out_features), weights and biases."""
    x, weights, biases = make_case(sizes, leading, bias, dtype)
    target = torch.randn(*_sizes(leading), sizes[-1], dtype=torch.float64).to(dtype)
    return x, target, weights, biases


def integer_case(sizes, leading=5, bias="all", dtype=torch.float64):
    """x, weights and biases of small integers: every sum is exact, in every order."""
    weights, biases = integer_network(sizes, bias, dtype, requires_grad=False, largest=1)
    return integers(*_sizes(leading), sizes[0], dtype=dtype), weights, biases


def leaves(x, weights, biases=None) -> dict[str, Tensor]:
    """The tensors of a network by name, without the missing biases."""
    named = {"x": x}
    named |= {f"weights[{layer}]": weight for layer, weight in enumerate(weights)}
    named |= {f"biases[{n}]": bias for n, bias in enumerate(biases or []) if bias is not None}
    return named


def by_name(of_parameters) -> dict[str, Tensor]:
    """The entries of a pair (weights, biases), named as in `leaves`."""
    named = leaves(None, *of_parameters)
    del named["x"]
    return named


def gradients(y, named: dict[str, Tensor], grad_output=None, **settings) -> dict[str, Tensor]:
    """The gradient of every tensor that requires one, by name."""
    wanted = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    if grad_output is None:
        grad_output = torch.ones_like(y)
    grads = torch.autograd.grad(y, list(wanted.values()), grad_output, **settings)
    return dict(zip(wanted, grads, strict=True))


def layers_of(net: Sequence[torch.nn.Module]) -> tuple[list[Tensor], list[Tensor | None]]:
    linears = [m for m in net if isinstance(m, torch.nn.Linear)]
    return [m.weight for m in linears], [m.bias for m in linears]


def integers_(module):
    """Sets every parameter to integers from -2 to 2, the same ones in all networks of a kind."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    return module


def module_of(activation):
    """A list with the module of an output activation. It is empty for None."""
    rows = {row.name: row for row in activations.ROWS}
    return [] if activation is None else [rows[activation].module()]


def twins(in_features, hidden, out_features, seed=0, **arguments):
    """A ReluMLP and the equivalent nn.Sequential, each with its own copy of equal parameters."""
    torch.manual_seed(seed)
    net = relu_mlp.ReluMLP(in_features, hidden, out_features, **arguments)
    torch.manual_seed(seed)
    sizes = [in_features, *([hidden] if isinstance(hidden, int) else hidden), out_features]
    options = {k: v for k, v in arguments.items() if k in ("bias", "device", "dtype")}
    children = []
    for n_in, n_out in zip(sizes, sizes[1:]):
        children += [torch.nn.Linear(n_in, n_out, **options), torch.nn.ReLU()]
    children.pop()
    children += module_of(arguments.get("output_activation"))
    return net, torch.nn.Sequential(*children)
