"""Compares a transform of the network with the same transform of the native path.

Integer networks make every sum exact. So without an output activation, and with ReLU, the bits must
agree. With sigmoid and tanh the pre-activations are still exact, and the results must lie within
the bounds of bounds.py.
"""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_flatten, tree_map

from relu_mlp import relu_mlp

from .bounds import SMOOTH, assert_within, gamma, majorant
from .comparison import assert_same
from .networks import integer_network, integers, leaves, native_mlp

SIZES = [2, 3, 3, 2]
ROWS = 2


def problem(activation, bias="all", shape=(ROWS,), sizes=SIZES, dtype=torch.float64):
    """The tensors of a network by name, two tangents for each, and a gradient for its output."""
    torch.manual_seed(len(sizes) + len(shape))
    weights, biases = integer_network(sizes, bias, dtype, requires_grad=False)
    primals = leaves(integers(*shape, sizes[0], dtype=dtype), weights, biases)
    if activation in SMOOTH:
        # With a few binary places, products stay exact and the activation is not saturated.
        primals = {name: tensor / 4 for name, tensor in primals.items()}
    tangents = [{n: integers(*p.shape, dtype=dtype) for n, p in primals.items()} for _ in range(2)]
    return primals, *tangents, integers(*shape, sizes[-1], dtype=dtype)


def of_names(network, activation, layers):
    """A network as a function of its tensors by name."""

    def function(named):
        weights = [named[f"weights[{layer}]"] for layer in range(layers)]
        biases = [named.get(f"biases[{layer}]") for layer in range(layers)]
        if all(bias is None for bias in biases):
            biases = None
        return network(named["x"], weights, biases, output_activation=activation)

    return function


def compare(transform, activation, arguments, order, sizes=SIZES, network=relu_mlp):
    """Asserts that a transform gives the same for the network as for the native path.

    `transform` takes the network, as a function of a dict of tensors, and `arguments`. It must
    be a polynomial of them with positive coefficients, and of derivatives up to `order`.
    """
    layers = len(sizes) - 1
    expected = transform(of_names(native_mlp, activation, layers), *arguments)
    actual = transform(of_names(network, activation, layers), *arguments)
    (expected, expected_tree), (actual, tree) = tree_flatten(expected), tree_flatten(actual)
    assert tree == expected_tree
    if activation in (None, "relu"):
        for n, (ours, theirs) in enumerate(zip(actual, expected)):
            assert_same(ours, theirs, f"result {n}")
        return
    absolute = tree_map(torch.abs, arguments)
    magnitudes = transform(of_names(majorant, activation, layers), *absolute)
    magnitudes = [magnitude.detach() for magnitude in tree_flatten(magnitudes)[0]]
    # The network and the loss, forwards and backwards once for each derivative.
    longest = max(*sizes, *(tensor.numel() for tensor in expected))
    error = gamma(2**order * (layers + 1), longest, expected[0].dtype)
    for n, (ours, theirs, magnitude) in enumerate(zip(actual, expected, magnitudes)):
        assert_within(ours, theirs, 2 * error * magnitude, f"result {n}")


def loss(y):
    return y.square().sum()


def dot(a, b):
    return sum((a[name] * b[name]).sum() for name in a)


def of_loss(f):
    return lambda p: loss(f(p))
