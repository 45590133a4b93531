"""Bounds on the difference between two computations of the same numbers.

Every tolerance in these tests comes from here. The error of a sum of n products, in any order, with
or without fused multiply-add, in arithmetic of unit roundoff u, is at most
gamma(n) = n u / (1 - n u) times the sum of the absolute values of its terms (Higham, Accuracy and
Stability of Numerical Algorithms, section 3.1).

There are two ways to apply this. `Exact` propagates a bound through the layers together with every
value. Its bounds are tight, and hold for outputs and first derivatives in every dtype. `majorant`
is a network in which every term is positive and every output activation is an exponential. Its
derivatives, of any order, bound the sums of absolute values in the same derivatives of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from relu_mlp import functional, ops
from relu_mlp._torch_private import below_autograd

from .networks import by_name, gradients, leaves, native_mlp


@dataclass
class Bounded:
    """Values in float64, and bounds on the error of a computation in another dtype."""

    value: Tensor
    bound: Tensor

    def check(self, actual: Tensor | None, name: str) -> None:
        assert actual is not None, f"{name} is missing"
        assert actual.shape == self.value.shape, f"{name}: {actual.shape} != {self.value.shape}"
        excess = (actual.double() - self.value).abs() - self.bound
        worst = int(excess.flatten().argmax()) if excess.numel() else 0
        found, value, bound = (t.flatten()[worst:] for t in (actual, self.value, self.bound))
        assert not excess.numel() or excess.flatten()[worst] <= 0, (
            f"{name}, element {worst}: {found[0].item()!r} should be {value[0].item()!r} "
            f"within {bound[0].item():.3g}"
        )


class Smooth(NamedTuple):
    """An output activation phi whose derivative is not piecewise constant."""

    phi: Callable[[Tensor], Tensor]
    steepest: float  #: the largest |phi'|
    #: (y, unit roundoff u) -> phi', computed from y
    slope: Callable[[Bounded, float], Bounded]


SMOOTH = {
    "sigmoid": Smooth(
        torch.sigmoid, 1 / 4, lambda y, u: Bounded(y.value * (1 - y.value), y.bound + 3 * u)
    ),
    "tanh": Smooth(
        torch.tanh,
        1,
        lambda y, u: Bounded(1 - y.value**2, (2 * y.value.abs() + y.bound) * y.bound + 3 * u),
    ),
}


class Exact:
    """A network in float64 whose results carry bounds for one dtype.

    Where a pre-activation is within its bound of 0, rounding decides whether the unit is on. Only
    there, the mask is taken from the activations of the implementation under test.

    Args:
        x: (rows, in_features), in the dtype under test, like the other tensors.
        hidden: the hidden activations that the implementation found.
    """

    def __init__(self, x, weights, biases, output_activation, hidden, y):
        dtype = x.dtype
        info = torch.finfo(dtype)
        self.store = info.eps / 2  # one rounding to dtype
        self.tiny = info.smallest_normal * info.eps  # ... of a number close to 0
        # bfloat16 and float16 are summed in float32
        self.u = min(info.eps, torch.finfo(torch.float32).eps) / 2
        self.activation = output_activation
        self.weights = [w.detach().double() for w in weights]
        biases = biases or [None] * len(weights)
        self.a = [Bounded(x.detach().double(), torch.zeros_like(x, dtype=torch.float64))]
        self.masks = []
        for layer, weight in enumerate(self.weights):
            bias = biases[layer]
            z = self.product(self.a[-1], Bounded(weight.T, torch.zeros_like(weight.T)), bias)
            last = layer == len(weights) - 1
            if last and output_activation != "relu":
                break
            found = (y if last else hidden[layer]).detach().reshape(z.value.shape) > 0
            unclear = z.value.abs() <= z.bound
            on = torch.where(unclear, found, z.value > 0)
            self.masks.append(on)
            self.a.append(Bounded(z.value.clamp(min=0), z.bound))
        if output_activation == "relu":
            self.y = self.a.pop()
        elif output_activation is None:
            self.y = z
        else:
            # PyTorch's functions are accurate to a few units in the last place
            smooth = SMOOTH[output_activation]
            y64 = smooth.phi(z.value)
            bound = z.bound * smooth.steepest + 4 * self.u * y64.abs()
            self.y = self.stored(Bounded(y64, bound))

    def gamma(self, n: int) -> float:
        assert n * self.u < 0.5, "the bound says nothing about sums this long"
        return n * self.u / (1 - n * self.u)

    def stored(self, b: Bounded) -> Bounded:
        return Bounded(b.value, b.bound + self.store * (b.value.abs() + b.bound) + self.tiny)

    def product(self, a: Bounded, b: Bounded, bias: Tensor | None = None) -> Bounded:
        """a b + bias as sums of products, which are then rounded to be stored."""
        value = a.value @ b.value
        largest = (a.value.abs() + a.bound) @ (b.value.abs() + b.bound)
        carried = largest - a.value.abs() @ b.value.abs()
        if bias is not None:
            value = value + bias.detach().double()
            largest = largest + bias.detach().double().abs()
        terms = a.value.shape[1] + (bias is not None)
        return self.stored(Bounded(value, carried + self.gamma(terms) * largest))

    def backward(self, grad_output: Tensor) -> dict[str, Bounded]:
        """The gradients by name: "x", "weights[0]", ..., "biases[0]", ..."""
        g = grad_output.detach().double().reshape(self.y.value.shape)
        y, none = self.y, torch.zeros_like(g)
        if self.activation in SMOOTH:
            factor = SMOOTH[self.activation].slope(y, self.u)
        elif self.activation == "relu":
            factor = Bounded(self.masks[-1].double(), none)
        else:
            factor = Bounded(torch.ones_like(g), none)
        delta = Bounded(g * factor.value, g.abs() * factor.bound)
        if self.activation in SMOOTH:
            # PyTorch stores this delta in the dtype, and rounds two products
            size = delta.value.abs() + delta.bound
            delta = self.stored(Bounded(delta.value, delta.bound + 3 * self.u * size))
        grads = {}
        for layer in reversed(range(len(self.weights))):
            transposed = Bounded(delta.value.T, delta.bound.T)
            ones = torch.ones(g.shape[0], 1, dtype=torch.float64)
            grads[f"weights[{layer}]"] = self.product(transposed, self.a[layer])
            sums = self.product(transposed, Bounded(ones, torch.zeros_like(ones)))
            grads[f"biases[{layer}]"] = Bounded(sums.value[:, 0], sums.bound[:, 0])
            weight = self.weights[layer]
            delta = self.product(delta, Bounded(weight, torch.zeros_like(weight)))
            if layer:
                on = self.masks[layer - 1]
                delta = Bounded(delta.value * on, delta.bound * on)
        grads["x"] = delta
        return grads


def hidden_of(implementation, x, weights, biases, output_activation):
    """y and the hidden activations that an implementation finds."""
    present = [ops.NO_TENSOR if b is None else b.detach() for b in biases or []]
    with below_autograd(), torch.no_grad():
        return implementation.forward(
            x.detach(),
            [w.detach() for w in weights],
            present,
            functional.activation_name(output_activation),
            True,
        )


#: A bound for the sums of absolute values in the first three derivatives of
#: sigmoid and tanh, written in y with |y| <= 1. For tanh they are 1 - y y: 2;
#: then -2 y times the first: 2 * 2; then the sum of four products: 4 * 4. Those of
#: sigmoid, (1 - y) y with 0 <= y <= 1, are smaller. An activation in `SMOOTH` must not have
#: larger ones.
ACTIVATION_TERMS = 16.0


def majorant(x, weights, biases=None, *, output_activation=None):
    """A network without ReLUs whose output activation is a large exponential.

    Its derivatives, taken at absolute values and contracted with them, bound the sums of the
    absolute values of the terms in the network's own derivatives.
    """
    for layer, weight in enumerate(weights):
        x = F.linear(x, weight, biases[layer] if biases else None)
    if output_activation in SMOOTH:
        # every derivative of this is ACTIVATION_TERMS
        x = ACTIVATION_TERMS * torch.exp(x - x.detach())
    return x


def absolutes(tensors):
    """The absolute values as new leaves, with the same `requires_grad`."""
    if tensors is None:
        return None
    return [
        None if t is None else t.detach().abs().requires_grad_(t.requires_grad) for t in tensors
    ]


def gamma(products_in_series: int, longest_sum: int, dtype=torch.float64) -> float:
    """The bound for a chain of sums: u times the number of roundings of one term.

    A matrix product is a sum of `longest_sum` terms and perhaps a bias. The activation and its
    derivatives, of any order, are at most 32 operations.
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
    """For every entry of the Jacobian, the sum of the absolute values of its terms."""
    tensors = absolutes([x])[0], absolutes(weights), absolutes(biases)
    return native_jacobian(*tensors, output_activation=activation, network=majorant)


def first_order_bounds(x, weights, biases, activation, grad_output=None):
    """Bounds on the difference between the gradients of two computations of a network."""
    a_x, a_weights, a_biases = absolutes([x])[0], absolutes(weights), absolutes(biases)
    y = majorant(a_x, a_weights, a_biases, output_activation=activation)
    grad_output = torch.ones_like(y) if grad_output is None else grad_output.abs()
    magnitudes = gradients(y, leaves(a_x, a_weights, a_biases), grad_output)
    longest = max(x.shape[:-1].numel(), *(max(weight.shape) for weight in weights))
    error = gamma(2 * len(weights), longest)  # forward and backward through every layer
    return {name: 2 * error * magnitude for name, magnitude in magnitudes.items()}
