"""Derivatives of the first, second and third order, in double precision: the first two against
finite differences, the third against native autograd.
"""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import support
from relu_mlp import reference, relu_mlp
from support import (
    absolutes,
    assert_within,
    gamma,
    hidden_pre_activations,
    leaves,
    majorant,
    native_mlp,
)

SIZES = {1: [3, 2], 2: [3, 4, 2], 3: [3, 4, 3, 2]}
ROWS = 2
STEP = 1e-6  # the step of the finite differences

#: Which inputs need gradients, by name; "last" is replaced by the last layer.
NEEDS = {
    "all": ("x", "weights", "biases"),
    "x": ("x",),
    "weights": ("weights",),
    "biases": ("biases",),
    "x and biases": ("x", "biases"),
    "parameters": ("weights", "biases"),
    "weights[0]": ("weights[0]",),
    "weights[last]": ("weights[last]",),
    "biases[0]": ("biases[0]",),
    "biases[last]": ("biases[last]",),
}


def has_needed(depth, bias, needs):
    """Whether any of the needed inputs exists: biases may be missing."""
    missing = bias == "none" or (bias == "some" and needs == "biases[last]" and depth == 2)
    return not (missing and needs.startswith("biases"))


CASES = [
    case
    for case in itertools.product(SIZES, ["all", "none", "some"], support.ACTIVATIONS, NEEDS)
    if has_needed(case[0], case[1], case[3])
]


def network(depth, bias, activation, needs):
    """x, weights and biases for which no finite difference moves a pre-activation across 0."""
    sizes = SIZES[depth]
    for seed in itertools.count():
        torch.manual_seed(seed)
        weights, biases = support.make_network(sizes, bias)
        x = torch.randn(ROWS, sizes[0], dtype=torch.float64)
        if kink_distance(x, weights, biases, activation) > STEP * sensitivity(x, weights, biases):
            break
    chosen = [name.replace("last", str(depth - 1)) for name in NEEDS[needs]]
    for name, tensor in leaves(x, weights, biases).items():
        tensor.requires_grad_(name in chosen or name.partition("[")[0] in chosen)
    return x, weights, biases


def kink_distance(x, weights, biases, activation):
    """The smallest distance of a ReLU's pre-activation from 0."""
    z = hidden_pre_activations(x, weights, biases)
    if activation == "relu":
        z.append(native_mlp(x, weights, biases))
    return min((values.abs().min().item() for values in z), default=float("inf"))


def sensitivity(x, weights, biases):
    """A bound on |dz/dp| for any pre-activation z and any element p of the inputs.

    One element of layer k moves z_k by at most max(1, |a_{k-1}|, |W_k|) times its own change, and
    each layer above multiplies this by at most the largest row sum of |W|.
    """
    z = hidden_pre_activations(x, weights, biases)
    largest = max([1.0, x.abs().max().item()] + [w.abs().max().item() for w in weights])
    largest = max([largest] + [values.abs().max().item() for values in z])
    for weight in weights:
        largest *= max(1.0, weight.detach().abs().sum(1).max().item())
    return largest


def finite_difference_bound(x, weights, biases, activation, grad_output):
    """The largest error of a central difference of y or of a gradient.

    Rounding: the error of the function over the step. Truncation: step^2 / 6 times the third
    derivative. That is 0 without a smooth activation, because the rest is linear in any single
    element. For a gradient, a sum over the elements of y of g phi'(z) dz/dp, it is at most g
    (phi'''' D^4 + 3 phi''' D^3), with D the bound of |dz/dp| and of its derivatives; |phi''''| < 5,
    |phi'''| <= 2.
    """
    y = native_mlp(x, weights, biases, output_activation=activation).detach()
    hidden = support.hidden_of(reference, x, weights, biases, activation)[1]
    exact = support.Exact(x.detach(), weights, biases, activation, hidden, y)
    bounds = [exact.y.bound, *(b.bound for b in exact.backward(grad_output).values())]
    rounding = max(b.max().item() for b in bounds) / STEP
    if activation not in support.SMOOTH:
        return rounding
    size = sensitivity(x, weights, biases)
    terms = grad_output.abs().sum().item()
    return rounding + STEP**2 / 6 * max(1, terms) * (5 * size**4 + 3 * 2 * size**3)


@pytest.mark.covering
@pytest.mark.parametrize("depth, bias, activation, needs", CASES)
def test_first_and_second_derivative(backend, depth, bias, activation, needs):
    check_two_orders(depth, bias, activation, needs, recompute=False)


@pytest.mark.covering
@pytest.mark.parametrize("needs", ["all", "x", "weights[0]", "biases[last]"])
@pytest.mark.parametrize("activation", support.ACTIVATIONS, ids=str)
@pytest.mark.parametrize("depth", SIZES)
def test_recomputed(backend, depth, activation, needs):
    check_two_orders(depth, "all", activation, needs, recompute=True)


def check_two_orders(depth, bias, activation, needs, recompute):
    x, weights, biases = network(depth, bias, activation, needs)
    assert kink_distance(x, weights, biases, activation) > STEP * sensitivity(x, weights, biases)
    present = list(leaves(x, weights, biases).values())

    def function(*_):  # gradcheck changes the tensors in place
        return relu_mlp(x, weights, biases, output_activation=activation, recompute=recompute)

    grad_output = torch.randn(ROWS, SIZES[depth][-1], dtype=torch.float64, requires_grad=True)
    bound = finite_difference_bound(x, weights, biases, activation, grad_output.detach())
    assert bound < 1e-3, "the finite differences are too coarse to find a mistake"
    settings = {"eps": STEP, "atol": bound, "rtol": 0.0}
    assert gradcheck(function, present, **settings)
    assert gradgradcheck(function, present, [grad_output], **settings)


def third_order(mlp, x, weights, biases, directions, **settings):
    """Gradients of a directional derivative of a directional derivative of y."""
    named = leaves(x, weights, biases)
    present = list(named.values())
    value = (mlp(x, weights, biases, **settings) * directions[0]).sum()
    for direction in directions[1:]:
        grads = torch.autograd.grad(value, present, create_graph=True, allow_unused=True)
        terms = zip(grads, direction, strict=True)
        value = sum((g * d).sum() for g, d in terms if g is not None)
        if not value.requires_grad:  # a linear network has no more derivatives
            return {name: torch.zeros_like(t) for name, t in named.items()}
    grads = torch.autograd.grad(value, present, materialize_grads=True)
    return dict(zip(named, grads, strict=True))


@pytest.mark.covering
@pytest.mark.parametrize("activation", support.ACTIVATIONS, ids=str)
@pytest.mark.parametrize("bias", ["all", "none", "some"])
@pytest.mark.parametrize("depth", SIZES)
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_third_derivative(backend, recompute, depth, bias, activation):
    x, weights, biases = network(depth, bias, activation, "all")
    present = list(leaves(x, weights, biases).values())
    ends = torch.randn(ROWS, SIZES[depth][-1], dtype=torch.float64)
    directions = [ends] + [[torch.randn_like(t) for t in present] for _ in range(2)]
    actual, expected = (
        third_order(mlp, x, weights, biases, directions, output_activation=activation, **settings)
        for mlp, settings in [(relu_mlp, {"recompute": recompute}), (native_mlp, {})]
    )
    magnitudes = third_order(
        majorant,
        absolutes([x])[0],
        absolutes(weights),
        absolutes(biases),
        [ends.abs()] + [[d.abs() for d in direction] for direction in directions[1:]],
        output_activation=activation,
    )
    # each order doubles the number of products in series, and both paths round
    error = gamma(products_in_series=8 * depth, longest_sum=4)
    assert_within(actual, expected, {name: 2 * error * m for name, m in magnitudes.items()})
