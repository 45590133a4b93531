"""Comparisons with the native path that need no tolerance, or a derived one.

Exact: of small integers, sums of products are exact in every order, so both
paths must give the same bits. Bounded: a majorant of the network, in which every
term is positive and every output activation an exponential, has derivatives that
bound the sums of absolute values on the way to the same derivatives of the
network; the rounding errors are at most gamma(n) times those (see support.py).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from relu_mlp import functional


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


def native_mlp(x, weights, biases=None, *, output_activation=None, recompute=False):
    """`relu_mlp` by PyTorch's own layers."""
    for layer, weight in enumerate(weights):
        x = F.linear(x, weight, biases[layer] if biases else None)
        if layer < len(weights) - 1:
            x = F.relu(x)
    return getattr(torch, output_activation)(x) if output_activation else x


def leaves(x, weights, biases=None) -> dict[str, Tensor]:
    """The tensors of a network by name, without the missing biases."""
    named = {"x": x}
    named |= {f"weights[{layer}]": weight for layer, weight in enumerate(weights)}
    named |= {f"biases[{n}]": bias for n, bias in enumerate(biases or []) if bias is not None}
    return named


def by_name(of_parameters) -> dict[str, Tensor]:
    """What belongs to each parameter in a pair (weights, biases), named as in `leaves`."""
    named = leaves(None, *of_parameters)
    del named["x"]
    return named


def gradients(y, named: dict[str, Tensor], grad_output=None) -> dict[str, Tensor]:
    """The gradient of every tensor that requires one, by name."""
    wanted = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    if grad_output is None:
        grad_output = torch.ones_like(y)
    grads = torch.autograd.grad(y, list(wanted.values()), grad_output)
    return dict(zip(wanted, grads, strict=True))


def outcome(function, *args, match=""):
    """What a function returns, or RuntimeError if it raises one that says `match`."""
    try:
        return function(*args)
    except RuntimeError as error:
        if match not in str(error):
            raise
        return RuntimeError


def assert_same(actual, expected, name="value"):
    """The same structure with the same bits; NaN equals NaN, and 0 equals -0."""
    if isinstance(expected, dict):
        assert isinstance(actual, dict) and actual.keys() == expected.keys(), name
        for key in expected:
            assert_same(actual[key], expected[key], f"{name}, {key}")
    elif isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), f"{name}: {actual!r} instead of a tensor"
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}"
        )
    else:
        assert actual is expected, f"{name}: {actual!r} should be {expected!r}"


def patterns(count):
    """All tuples of `count` bools."""
    return itertools.product([False, True], repeat=count)


# -- Bounds -----------------------------------------------------------------------

#: A bound for the sums of absolute values in the first three derivatives of
#: sigmoid and tanh, written in y with |y| <= 1. For tanh they are 1 - y y: 2;
#: then -2 y times the first: 2 * 2; then the sum of four products: 4 * 4. Those of
#: sigmoid, (1 - y) y with 0 <= y <= 1, are smaller.
ACTIVATION_TERMS = 16.0


def majorant(x, weights, biases=None, *, output_activation=None):
    """A network without ReLUs whose output activation is a large exponential.

    Its derivatives, taken at absolute values and contracted with them, bound
    the sums of the absolute values of the terms of the network's own.
    """
    for layer, weight in enumerate(weights):
        x = F.linear(x, weight, biases[layer] if biases else None)
    if output_activation in ("sigmoid", "tanh"):
        # every derivative of this is ACTIVATION_TERMS
        x = ACTIVATION_TERMS * torch.exp(x - x.detach())
    return x


def absolutes(tensors):
    """Their absolute values as new leaves that require what they require."""
    if tensors is None:
        return None
    return [
        None if t is None else t.detach().abs().requires_grad_(t.requires_grad) for t in tensors
    ]


def gamma(products_in_series: int, longest_sum: int, dtype=torch.float64) -> float:
    """The bound for a chain of sums: u times the roundings that one term meets.

    A product of matrices is a sum of `longest_sum` terms and perhaps a bias; the
    activation and its derivatives, of any order, are at most 32 operations.
    """
    n = products_in_series * (longest_sum + 1) + 32
    u = torch.finfo(dtype).eps / 2
    return n * u / (1 - n * u)


def assert_within(actual, expected, bounds, name="value"):
    """|actual - expected| <= bounds, for tensors or dicts of them."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), name
        for key in expected:
            assert_within(actual[key], expected[key], bounds[key], f"{name}, {key}")
        return
    assert actual.shape == expected.shape, f"{name}: {actual.shape} != {expected.shape}"
    error = (actual - expected).abs()
    assert (error <= bounds).all(), f"{name}: off by {error.max():.3g}, {bounds.max():.3g} allowed"


def hidden_pre_activations(x, weights, biases=None) -> list[Tensor]:
    """z_1, ..., z_{L-1}, natively."""
    z, a = [], x.detach()
    for layer, weight in enumerate(weights[:-1]):
        z.append(F.linear(a, weight, biases[layer] if biases else None).detach())
        a = z[-1].relu()
    return z


def implementation_of(backend):
    """The object whose `forward` and `backward` serve a backend."""
    assert backend in ("extension", "reference")
    return functional.implementation_for(torch.empty(0))


def native_jacobian(x, weights, biases=None, *, output_activation=None, network=native_mlp):
    """dy/dp of every parameter p by name, (rows, out_features, *p.shape), by `jacrev`."""

    def y(parameters):
        return network(
            x,
            [parameters[f"weights[{layer}]"] for layer in range(len(weights))],
            [parameters.get(f"biases[{layer}]") for layer in range(len(weights))],
            output_activation=output_activation,
        )

    return torch.func.jacrev(y)(by_name((weights, biases)))


def jacobian_magnitudes(x, weights, biases, activation) -> dict[str, Tensor]:
    """The sums of absolute values on the way to every entry of the Jacobian."""
    tensors = absolutes([x])[0], absolutes(weights), absolutes(biases)
    return native_jacobian(*tensors, output_activation=activation, network=majorant)


def first_order_bounds(x, weights, biases, activation, grad_output=None):
    """How far the gradients of two computations of a network may lie apart."""
    a_x, a_weights, a_biases = absolutes([x])[0], absolutes(weights), absolutes(biases)
    y = majorant(a_x, a_weights, a_biases, output_activation=activation)
    grad_output = torch.ones_like(y) if grad_output is None else grad_output.abs()
    magnitudes = gradients(y, leaves(a_x, a_weights, a_biases), grad_output)
    longest = max(x.shape[:-1].numel(), *(max(weight.shape) for weight in weights))
    error = gamma(2 * len(weights), longest)  # forward and backward through every layer
    return {name: 2 * error * magnitude for name, magnitude in magnitudes.items()}
