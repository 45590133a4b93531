"""`linearize`: products with the Jacobian, which is never formed."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import relu_mlp
import support
from relu_mlp import Linearization, Parameters, jacobian, linearize
from support import (
    Bounded,
    absolutes,
    assert_same,
    assert_within,
    by_name,
    gamma,
    integer_case,
    integer_network,
    integers,
    jacobian_magnitudes,
    leaves,
    majorant,
    make_case,
    native_jacobian,
)
from support.bad_arguments import (
    NETWORKS,
    NO_ACTIVATIONS,
    assert_unchanged,
    snapshot,
    under_every_backend,
)

#: Nothing here depends on whether the native node records a graph.
backend = support.backend_fixture(support.BACKENDS)

# torch.jit is deprecated, and forward-mode differentiation loads it.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

NETWORKS_AND_ROWS = [  # sizes, leading sizes of x
    ([3, 2], [5]),
    ([2, 1, 1, 3], [2, 3]),
    ([5, 7, 4, 3], [6]),
    ([3, 4, 2], []),
    ([3, 4, 2], [0]),
]
NETWORK_SIZES = [[3, 2], [2, 1, 1, 3], [5, 7, 4, 3]]
LEADING = [[5], [], [2, 3], [0], [1, 2, 1]]


def like(weights, biases, random=torch.randn_like):
    """Random `Parameters` with the shapes of a network's parameters."""
    of_biases = biases and tuple(None if b is None else random(b) for b in biases)
    return Parameters(tuple(map(random, weights)), of_biases)


def integers_like(tensor):
    return integers(*tensor.shape, dtype=tensor.dtype, largest=1)


def native_function(x, weights, biases, activation):
    """y as a function of the parameters, and the parameters, by name."""

    def y(given):
        return support.native_mlp(
            x,
            [given[f"weights[{n}]"] for n in range(len(weights))],
            [given.get(f"biases[{n}]") for n in range(len(weights))],
            activation,
        )

    return y, by_name((weights, biases))


def native_jvp(x, weights, biases, activation, tangent):
    y, parameters = native_function(x, weights, biases, activation)
    return torch.func.jvp(y, (parameters,), (by_name(tangent),))[1]


def native_vjp(x, weights, biases, activation, grad_output):
    y, parameters = native_function(x, weights, biases, activation)
    given = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    grads = torch.autograd.grad(y(given), list(given.values()), grad_output)
    return dict(zip(given, grads, strict=True))


def times(entries, tangent):
    """J v, for a Jacobian and a vector by name: (rows, out_features)."""
    return sum((entries[name] * tangent[name]).flatten(2).sum(2) for name in entries)


def transposed_times(entries, grad_output):
    """J^T u by name."""
    return {n: torch.einsum("no,no...->...", grad_output, entry) for n, entry in entries.items()}


def magnitudes_of(x, weights, biases, activation):
    return jacobian_magnitudes(x.reshape(-1, x.shape[-1]), weights, biases, activation)


def error_of(x, weights, products):
    """The bound for `products` matrix products in series per layer, or sums over parameters."""
    parameters = sum(weight.numel() + len(weight) for weight in weights)
    rows = math.prod(x.shape[:-1])
    longest = max(parameters, rows * len(weights[-1]), *(max(w.shape) for w in weights))
    return 2 * gamma(products * len(weights) + 2, longest)


# -- Values --------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize(("sizes", "leading"), NETWORKS_AND_ROWS, ids=str)
@pytest.mark.parametrize("bias", ["all", "none", "some"])
@pytest.mark.parametrize("activation", support.ACTIVATIONS)
def test_products_are_the_native_ones(backend, activation, bias, sizes, leading):
    x, weights, biases = make_case(sizes, leading, bias)
    v, u = like(weights, biases), torch.randn(*leading, sizes[-1], dtype=torch.float64)
    linear = linearize(x, weights, biases, output_activation=activation)
    magnitudes = magnitudes_of(x, weights, biases, activation)

    a_v = {name: tensor.abs() for name, tensor in by_name(v).items()}
    a_jv = times(magnitudes, a_v)
    expected = native_jvp(x, weights, biases, activation, v)
    bound = error_of(x, weights, 2) * a_jv.reshape(expected.shape)
    assert_within(linear.jvp(v), expected, bound, "J v")

    expected = native_vjp(x, weights, biases, activation, u)
    a_u = u.abs().reshape(-1, sizes[-1])
    error = error_of(x, weights, 2)
    bounds = {n: error * t for n, t in transposed_times(magnitudes, a_u).items()}
    assert_within(by_name(linear.vjp(u)), expected, bounds, "J^T u")

    expected = native_vjp(
        x, weights, biases, activation, native_jvp(x, weights, biases, activation, v)
    )
    error = error_of(x, weights, 4)
    bounds = {n: error * t for n, t in transposed_times(magnitudes, a_jv).items()}
    assert_within(by_name(linear.gauss_newton(v)), expected, bounds, "J^T J v")


@pytest.mark.covering
@pytest.mark.parametrize(
    ("bias", "leading"), [("all", [6]), ("none", []), ("some", [2, 3])], ids=str
)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
def test_products_have_the_bits_of_the_native_ones(backend, dtype, activation, bias, leading):
    """With integers: natively, with the Jacobian formed, and without; adjoint to each other."""
    x, weights, biases = integer_case([3, 4, 3, 2], leading, bias, dtype)
    v, u = like(weights, biases, integers_like), integers(*leading, 2, dtype=dtype, largest=1)
    linear = linearize(x, weights, biases, output_activation=activation)
    y, jv, jtu = linear.y, linear.jvp(v), linear.vjp(u)
    assert_same(y, support.native_mlp(x, weights, biases, activation))
    assert_same(jv, native_jvp(x, weights, biases, activation, v))
    assert_same(by_name(jtu), native_vjp(x, weights, biases, activation, u))

    rows = x.reshape(-1, 3)
    entries = by_name(linear.jacobian())
    assert_same(entries, native_jacobian(rows, weights, biases, output_activation=activation))
    assert_same(entries, by_name(jacobian(rows, weights, biases, output_activation=activation)))
    entries = {name: entry.double() for name, entry in entries.items()}
    v64 = {name: tensor.double() for name, tensor in by_name(v).items()}
    assert_same(jv.double().reshape(-1, 2), times(entries, v64))
    of_jacobian = transposed_times(entries, u.double().reshape(-1, 2))
    assert_same({n: t.double() for n, t in by_name(jtu).items()}, of_jacobian)
    inner = sum((by_name(jtu)[n].double() * v64[n]).sum() for n in v64)
    assert inner == (u.double() * jv.double()).sum()
    assert_same(by_name(linear.gauss_newton(v)), by_name(linear.vjp(jv)))


@pytest.mark.covering
@pytest.mark.parametrize(("sizes", "bias"), [([3, 2], "all"), ([7, 16, 5, 2], "some")], ids=str)
@pytest.mark.parametrize("activation", support.ACTIVATIONS)
@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
def test_against_float64(backend, dtype, activation, bias, sizes):
    x, weights, biases = make_case(sizes, [5], bias, dtype)
    v, u = like(weights, biases), torch.randn(5, sizes[-1]).to(dtype)
    linear = linearize(x, weights, biases, output_activation=activation)
    implementation = relu_mlp.functional.implementation_for(x)
    _, hidden = support.hidden_of(implementation, x, weights, biases, activation)
    exact = support.Exact(x, weights, biases, activation, hidden, linear.y)

    exact.y.check(linear.y, "y")
    bounds = exact.backward(u)
    for name, grad in by_name(linear.vjp(u)).items():
        assert grad.dtype == dtype
        bounds[name].check(grad, name)
    jv = linear.jvp(v)
    assert jv.dtype == dtype
    forward_bounds(exact, v).check(jv, "J v")


def forward_bounds(exact, tangent):
    """J v in float64 with bounds, layer by layer. Each sum of products is rounded, and so is the
    total.
    """

    def known(tensor):
        return Bounded(tensor.double(), torch.zeros_like(tensor, dtype=torch.float64))

    change = None
    for layer, weight in enumerate(exact.weights):
        bias = tangent.biases[layer] if tangent.biases else None
        z = exact.product(exact.a[layer], known(tangent.weights[layer].T), bias)
        if change is not None:
            carried = exact.product(change, known(weight.T))
            size = z.value.abs() + z.bound + carried.value.abs() + carried.bound
            bound = z.bound + carried.bound + exact.u * size
            z = exact.stored(Bounded(z.value + carried.value, bound))
        if layer < len(exact.weights) - 1:
            on = exact.masks[layer]
            z = Bounded(z.value * on, z.bound * on)
        change = z
    y = exact.y
    if exact.activation == "relu":
        return Bounded(change.value * exact.masks[-1], change.bound * exact.masks[-1])
    if exact.activation is None:
        return change
    factor = support.SMOOTH[exact.activation].slope(y, 0)  # as in Exact.backward
    size = change.value.abs() + change.bound
    bound = size * (factor.bound + 6 * exact.u) + factor.value.abs() * change.bound
    return exact.stored(Bounded(change.value * factor.value, bound))


@pytest.mark.parametrize("activation", support.ACTIVATIONS)
def test_the_products_are_adjoint(backend, activation):
    """<u, J v> = <J^T u, v>"""
    x, weights, biases = make_case([5, 7, 4, 3], [6], "some")
    v, u = like(weights, biases), torch.randn(6, 3, dtype=torch.float64)
    linear = linearize(x, weights, biases, output_activation=activation)
    jtu, named = by_name(linear.vjp(u)), by_name(v)
    left, right = (u * linear.jvp(v)).sum(), sum((jtu[n] * named[n]).sum() for n in named)
    magnitudes = magnitudes_of(x, weights, biases, activation)
    a_jv = times(magnitudes, {name: tensor.abs() for name, tensor in named.items()})
    assert (left - right).abs() <= error_of(x, weights, 3) * (u.abs() * a_jv).sum()


def test_gauss_newton_is_the_hessian_of_a_linear_model(backend):
    """For the loss ½ sum (y - t)²: a linear network has no second derivative to leave out."""
    x, weights, biases = integer_case([3, 2], [7])
    target, v = integers(7, 2), like(weights, biases, integers_like)

    def loss(weight, bias):
        return 0.5 * (support.native_mlp(x, [weight], [bias]) - target).square().sum()

    _, expected = torch.autograd.functional.hvp(
        loss, (weights[0], biases[0]), (v.weights[0], v.biases[0])
    )
    found = linearize(x, weights, biases).gauss_newton(v)
    assert_same(found.weights[0], expected[0])
    assert_same(found.biases[0], expected[1])


@pytest.mark.parametrize("activation", support.ACTIVATIONS)
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_y_is_the_output(backend, leading, activation):
    x, weights, biases = make_case([3, 4, 2], leading)
    y = linearize(x, weights, biases, output_activation=activation).y
    expected = support.native_mlp(x, weights, biases, activation)
    a_x, a_weights, a_biases = absolutes([x])[0], absolutes(weights), absolutes(biases)
    bound = majorant(a_x, a_weights, a_biases, output_activation=activation)
    assert_within(y, expected, 2 * gamma(2, 4) * bound, "y")
    assert y.is_contiguous() and not y.requires_grad


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_the_jacobian_has_a_row_for_each_row_of_x(backend, leading):
    x, weights, biases = integer_case([3, 4, 2], leading, "some")
    found = linearize(x, weights, biases).jacobian()
    assert type(found) is Parameters
    parameters, rows = by_name((weights, biases)), math.prod(leading)
    for name, entry in by_name(found).items():
        assert entry.shape == (rows, 2, *parameters[name].shape)


# -- Tangents ------------------------------------------------------------------


@pytest.mark.parametrize("activation", support.ACTIVATIONS)
def test_none_is_a_change_of_zero(backend, activation):
    x, weights, biases = make_case([3, 4, 5, 2], [6])
    v = like(weights, biases)
    linear = linearize(x, weights, biases, output_activation=activation)
    zeros = [torch.zeros_like(bias) for bias in biases]
    for some in [(None, v.biases[1], None), (v.biases[0], None, v.biases[2]), (None, None, None)]:
        filled = [zero if b is None else b for b, zero in zip(some, zeros, strict=True)]
        assert_same(linear.jvp((v.weights, some)), linear.jvp((v.weights, filled)))
        found = linear.gauss_newton((v.weights, some))
        assert_same(by_name(found), by_name(linear.gauss_newton((v.weights, filled))))
    assert_same(linear.jvp((v.weights, None)), linear.jvp((v.weights, (None, None, None))))


def test_any_sequences_in_a_pair(backend):
    x, weights, biases = make_case([3, 4, 2], [6], "some")
    v = like(weights, biases)
    expected = linearize(x, weights, biases).jvp(v)
    linear = linearize(x, tuple(weights), iter(biases))
    for kind in (list, tuple, iter):
        assert_same(linear.jvp((kind(v.weights), kind(v.biases))), expected)


def test_results_are_valid_tangents(backend):
    """The gradient of a loss is a valid tangent, and so are another network's parameters."""
    x, weights, biases = integer_case([3, 4, 2], [6], "some")
    linear = linearize(x, weights, biases)
    gradient = linear.vjp(linear.y)
    assert type(gradient) is Parameters
    assert_same(linear.jvp(gradient), native_jvp(x, weights, biases, None, gradient))
    linear.jvp((weights, biases))


def test_no_biases_and_missing_biases(backend):
    x, weights, biases = make_case([3, 4, 2], [6], "none")
    u = torch.randn(6, 2, dtype=torch.float64)
    assert biases is None and linearize(x, weights).vjp(u).biases is None
    linear = linearize(x, weights, [None, None])
    assert linear.vjp(u).biases == (None, None)
    assert linear.jacobian().biases == (None, None)
    v = tuple(map(torch.randn_like, weights))
    assert_same(linear.jvp((v, None)), linear.jvp((v, (None, None))))
    assert_same(linear.jvp((v, None)), linearize(x, weights).jvp((v, (None, None))))


@pytest.mark.parametrize("strange", support.LAYOUTS)
@pytest.mark.parametrize("leading", [[6], [2, 3]], ids=str)
def test_memory_layouts(backend, leading, strange):
    x, weights, biases = integer_case([3, 4, 2], leading)
    v, u = like(weights, biases, integers_like), integers(*leading, 2)
    linear = linearize(x, weights, biases)
    expected = linear.jvp(v), by_name(linear.vjp(u)), by_name(linear.jacobian())
    strange_v = Parameters(tuple(map(strange, v.weights)), tuple(map(strange, v.biases)))
    linear = linearize(strange(x), list(map(strange, weights)), list(map(strange, biases)))
    assert_same(linear.jvp(strange_v), expected[0])
    assert_same(by_name(linear.vjp(strange(u))), expected[1])
    assert_same(by_name(linear.jacobian()), expected[2])
    ones = linear.vjp(torch.ones(1, dtype=torch.float64).expand(*leading, 2))
    assert_same(by_name(ones), by_name(linear.vjp(torch.ones(*leading, 2).double())))


@pytest.mark.parametrize("activation", support.ACTIVATIONS)
@pytest.mark.parametrize(
    ("sizes", "leading"),
    [([3, 4, 2], [0]), ([3, 4, 2], [2, 0]), ([0, 4, 2], [3]), ([3, 0, 2], [3]), ([3, 4, 0], [3])],
    ids=str,
)
def test_sizes_of_zero(backend, sizes, leading, activation):
    x, weights, biases = integer_case(sizes, leading)
    v, u = like(weights, biases, integers_like), integers(*leading, sizes[-1])
    linear = linearize(x, weights, biases, output_activation=activation)
    jv, found, expected = linear.jvp(v), linear.vjp(u), like(weights, biases, torch.zeros_like)
    assert jv.shape == linear.y.shape == (*leading, sizes[-1])
    for name, grad in by_name(found).items():
        assert grad.shape == by_name(expected)[name].shape
        if 0 in leading or sizes[-1] == 0:  # a sum over nothing
            assert_same(grad, by_name(expected)[name], name)
    if sizes[1] == 0 and activation is None:
        assert_same(jv, v.biases[1].expand(*leading, 2))
        assert_same(found.biases[1], u.sum(0))


@pytest.mark.covering
@pytest.mark.parametrize("where", ["x", "weights[0]", "weights[1]", "biases[0]", "v", "u"])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_nan_and_infinity_as_natively(backend, activation, special, where):
    """The mask of a ReLU passes NaN, and selects: an infinity at a unit that is off becomes 0."""
    x, weights, biases = integer_case([3, 4, 2], [5])
    v, u = like(weights, biases, integers_like), integers(5, 2)
    tensors = {**leaves(x, weights, biases), "v": v.biases[0], "u": u}
    tensors[where].view(-1)[1] = special
    linear = linearize(x, weights, biases, output_activation=activation)
    if where != "weights[0]" or math.isnan(special):
        # natively x has a tangent of 0, and 0 times an infinite weight is NaN
        expected = native_jvp(x, weights, biases, activation, v)
        assert_same(linear.jvp(v), expected, "J v")
    expected = native_vjp(x, weights, biases, activation, u)
    assert_same(by_name(linear.vjp(u)), expected, "J^T u")


def test_an_infinite_weight_does_not_reach_x(backend):
    """x does not change: y = max(w x, 0) with an infinite w changes by x dw."""
    x, infinite = torch.tensor([[2.0], [-2.0]]), torch.tensor([[float("inf")]])
    linear = linearize(x, [infinite, torch.ones(1, 1)])
    found = linear.jvp(((torch.tensor([[3.0]]), torch.zeros(1, 1)), None))
    assert found[1].item() == 0  # off
    assert math.isnan(found[0].item())  # 6 times 1, and the infinite activation times 0
    found = linearize(x, [infinite], output_activation="relu").jvp(((torch.tensor([[3.0]]),), None))
    assert found.flatten().tolist() == [6, 0]


# -- How it is computed --------------------------------------------------------


@pytest.mark.parametrize("activation", support.ACTIVATIONS)
@pytest.mark.parametrize("sizes", NETWORK_SIZES, ids=str)
def test_one_pass_each(backend, sizes, activation):
    x, weights, biases = make_case(sizes, [2, 3], "some")
    v, u = like(weights, biases), torch.randn(2, 3, sizes[-1], dtype=torch.float64)
    layers = len(weights)
    with support.count_calls() as counts:
        linear = linearize(x, weights, biases, output_activation=activation)
    assert counts == {"forward": 1, "backward": 0, "loss_and_grads": 0, "native": 0}
    with support.count_calls() as counts:
        linear.vjp(u)
    assert counts == {"forward": 0, "backward": 1, "loss_and_grads": 0, "native": 0}
    with support.count_calls() as counts:
        linear.jvp(v)  # a product with each tangent, and above the first layer one with each weight
    assert counts == {"forward": 0, "backward": 0, "loss_and_grads": 0, "native": 2 * layers - 1}
    with support.count_calls() as counts:
        linear.gauss_newton(v)
    assert counts == {"forward": 0, "backward": 1, "loss_and_grads": 0, "native": 2 * layers - 1}


def test_keeps_the_backend_it_was_made_under():
    x, weights, biases = make_case([3, 4, 2], [5])
    u = torch.randn(5, 2, dtype=torch.float64)
    for first in support.BACKENDS:
        for second in support.BACKENDS:
            with relu_mlp.backend(first):
                linear = linearize(x, weights, biases)
            with relu_mlp.backend(second), support.dispatched() as operations:
                linear.vjp(u)
            calls = [name for name, _ in operations if name == "relu_mlp::backward"]
            assert len(calls) == (first == "extension")


@pytest.mark.parametrize("activation", support.ACTIVATIONS)
def test_the_jacobian_is_never_formed(backend, activation):
    """No tensor is larger than the activations of the widest layer or the largest weight."""
    rows, sizes = 20, [6, 9, 7, 8]
    x, weights, biases = make_case(sizes, [rows])
    v, u = like(weights, biases), torch.randn(rows, 8, dtype=torch.float64)
    with support.dispatched() as operations:
        linear = linearize(x, weights, biases, output_activation=activation)
        linear.jvp(v)
        linear.vjp(u)
        linear.gauss_newton(v)
    largest = max(held for _, held in operations)
    assert largest <= max(rows * max(sizes), *(weight.numel() for weight in weights))
    with support.dispatched() as operations:  # the measure detects it where it is formed
        linear.jacobian()
    assert max(held for _, held in operations) >= rows * 8 * weights[1].numel()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_nothing_requires_a_gradient(backend, mode):
    x, weights, biases = make_case([3, 4, 2], [5], "some")
    v, u = like(weights, biases), torch.randn(5, 2, dtype=torch.float64)
    linear = linearize(x, weights, biases, output_activation="tanh")
    expected = linear.y, linear.jvp(v), by_name(linear.vjp(u)), by_name(linear.jacobian())
    arguments = [*leaves(x, weights, biases).values(), *by_name(v).values(), u]
    for tensor in arguments:
        tensor.requires_grad_().grad = torch.ones_like(tensor)
    before = snapshot(arguments)
    with mode():
        linear = linearize(x * 1, [w * 1 for w in weights], biases, output_activation="tanh")
        found = linear.y, linear.jvp(v), by_name(linear.vjp(u)), by_name(linear.jacobian())
    for actual, wanted in zip(found, expected, strict=True):
        assert_same(actual, wanted)
        tensors = actual.values() if isinstance(actual, dict) else [actual]
        assert not any(tensor.requires_grad for tensor in tensors)
    assert_unchanged(before)


def test_made_in_inference_mode_and_used_outside(backend):
    x, weights, biases = make_case([3, 4, 2], [5])
    v, u = like(weights, biases), torch.randn(5, 2, dtype=torch.float64)
    expected = linearize(x, weights, biases)
    with torch.inference_mode():
        linear = linearize(x * 1, weights, biases)
    assert_same(linear.jvp(v), expected.jvp(v))
    assert_same(by_name(linear.vjp(u)), by_name(expected.vjp(u)))


def test_autocast_does_not_apply(backend):
    x, weights, biases = make_case([3, 4, 5, 2], [5], dtype=torch.float32)
    v, u = like(weights, biases), torch.randn(5, 2)
    linear = linearize(x, weights, biases)
    expected = linear.y, linear.jvp(v), by_name(linear.vjp(u)), by_name(linear.gauss_newton(v))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear = linearize(x, weights, biases)
        found = linear.y, linear.jvp(v), by_name(linear.vjp(u)), by_name(linear.gauss_newton(v))
    for actual, wanted in zip(found, expected, strict=True):
        assert_same(actual, wanted)


# -- Changes in place ----------------------------------------------------------

PRODUCTS = {
    "jvp": lambda linear, v, u: linear.jvp(v),
    "vjp": lambda linear, v, u: linear.vjp(u),
    "gauss_newton": lambda linear, v, u: linear.gauss_newton(v),
    "jacobian": lambda linear, v, u: linear.jacobian(),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=list(PRODUCTS))
@pytest.mark.parametrize(
    "changed", ["x", "y", "weights[0]", "weights[1]", "weights[2]", "biases[0]", "biases[2]"]
)
def test_after_a_change_in_place(backend, changed, product):
    x, weights, biases = make_case([3, 4, 5, 2], [6], "some")
    v, u = like(weights, biases), torch.randn(6, 2, dtype=torch.float64)
    linear = linearize(x, weights, biases)
    tensors = {**leaves(x, weights, biases), "y": linear.y}
    product(linear, v, u)
    with torch.no_grad():
        tensors[changed].add_(0)  # PyTorch counts changes, and does not compare values
    with pytest.raises(RuntimeError, match=r"changed in place.*linearize\(\.\.\.\) again"):
        product(linear, v, u)
    product(linearize(x, weights, biases), v, u)


def test_after_a_step_of_an_optimizer(backend):
    net, _ = support.twins(3, 4, 2)
    x, u = torch.randn(5, 3), torch.randn(5, 2)
    linear = linearize(x, *support.layers_of(net))
    for parameter, grad in zip(net.parameters(), torch.tensor([1.0, 2.0, 3.0, 4.0]), strict=True):
        parameter.grad = grad.expand(parameter.shape).clone()
    torch.optim.SGD(net.parameters(), lr=1e-3).step()
    with pytest.raises(RuntimeError, match="changed in place"):
        linear.vjp(u)


def through_a_file(linear):
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda linear: pickle.loads(pickle.dumps(linear)),
    "torch.save": through_a_file,
}


@pytest.mark.parametrize("made", COPIES.values(), ids=list(COPIES))
@pytest.mark.parametrize("bias", ["all", "some", "none"])
def test_a_copy_is_a_linearization_of_its_own(backend, bias, made):
    """Changes after the copy was made affect only the original."""
    x, weights, biases = make_case([3, 4, 5, 2], [6], bias)
    v, u = like(weights, biases), torch.randn(6, 2, dtype=torch.float64)
    with torch.no_grad():
        weights[0].add_(1)  # a copy counts its own changes from 0
    linear = linearize(x, weights, biases, output_activation="tanh")
    expected = [linear.y.clone(), linear.jvp(v), *map(by_name, [linear.vjp(u), linear.jacobian()])]
    copied = made(linear)
    assert copied._implementation is linear._implementation
    for tensor in [x, linear.y, *weights, *[b for b in biases or [] if b is not None]]:
        tensor.add_(1)
    copied = made(copied)
    actual = [copied.y, copied.jvp(v), *map(by_name, [copied.vjp(u), copied.jacobian()])]
    for own, wanted in zip(actual, expected, strict=True):
        assert_same(own, wanted)
    with pytest.raises(RuntimeError, match="changed in place"):
        made(linear)
    copied.y.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        copied.jvp(v)


def test_a_copy_beside_a_copy_of_the_network(backend):
    """They share no memory, which would hide a step of the copied network."""
    net, _ = support.twins(3, 4, 2)
    linear = linearize(torch.randn(5, 3), *support.layers_of(net))
    u = torch.randn(5, 2)
    expected = by_name(linear.vjp(u))
    for made in (copy.deepcopy, COPIES["pickle"]):
        copied_net, copied = made((net, linear))
        with torch.no_grad():
            for parameter in copied_net.parameters():
                parameter.zero_()
        assert_same(by_name(copied.vjp(u)), expected)


def test_changes_of_arguments_and_results_have_no_effect(backend):
    x, weights, biases = make_case([3, 4, 2], [6])
    v, u = like(weights, biases), torch.randn(6, 2, dtype=torch.float64)
    linear = linearize(x, weights, biases, output_activation="tanh")
    expected = [linear.jvp(v), linear.vjp(u), linear.jacobian()]
    expected = [
        expected[0].clone(),
        *({n: t.clone() for n, t in by_name(p).items()} for p in expected[1:]),
    ]
    for _ in range(2):
        jv, jtu, entries = linear.jvp(v), linear.vjp(u), linear.jacobian()
        assert_same(jv, expected[0])
        assert_same(by_name(jtu), expected[1])
        assert_same(by_name(entries), expected[2])
        for tensor in [jv, *by_name(jtu).values(), *by_name(entries).values()]:
            tensor.fill_(7)


# -- Errors --------------------------------------------------------------------


@pytest.mark.parametrize("bad", NETWORKS.values(), ids=list(NETWORKS))
def test_bad_networks(bad):
    call = lambda: linearize(bad.x, bad.weights, bad.biases)  # noqa: E731
    under_every_backend(call, bad.expected_error(), bad.words)


@pytest.mark.parametrize("activation", NO_ACTIVATIONS, ids=repr)
def test_unknown_activation(activation):
    words = ["output_activation", "None", "'relu'", "'sigmoid'", "'tanh'", repr(activation)]
    x, weights, _ = make_case([3, 4, 2], [5])
    call = lambda: linearize(x, weights, output_activation=activation)  # noqa: E731
    under_every_backend(call, ValueError, words)


W = torch.ones(4, 3), torch.ones(2, 4)
B = torch.ones(4), None
TANGENTS = {
    "None": (None, TypeError, ["tangent", "(weights, biases)", "NoneType"]),
    "a tensor": (W[0], TypeError, ["tangent", "(weights, biases)", "Tensor"]),
    "a list": ([W, B], TypeError, ["tangent", "(weights, biases)", "list"]),
    "three": ((W, B, B), TypeError, ["tangent", "(weights, biases)", "tuple"]),
    "one": ((W,), TypeError, ["tangent", "(weights, biases)", "tuple"]),
    "no weights": ((None, B), TypeError, ["tangent.weights", "sequence", "NoneType"]),
    "weights a number": ((3, B), TypeError, ["tangent.weights", "sequence", "int"]),
    "weights a tensor": ((W[0], B), TypeError, ["tangent.weights", "sequence", "Tensor"]),
    "biases a number": ((W, 3), TypeError, ["tangent.biases", "sequence", "int"]),
    "biases a tensor": ((W, B[0]), TypeError, ["tangent.biases", "sequence", "Tensor"]),
    "few weights": ((W[:1], B), ValueError, ["tangent.weights", "2 layers", "got 1"]),
    "many weights": (((*W, W[1]), B), ValueError, ["tangent.weights", "2 layers", "got 3"]),
    "few biases": ((W, B[:1]), ValueError, ["tangent.biases", "2 layers", "got 1"]),
    "biases empty": ((W, ()), ValueError, ["tangent.biases", "2 layers", "got 0"]),
    "a weight None": (((W[0], None), B), TypeError, ["tangent.weights[1]", "Tensor", "NoneType"]),
    "a weight a list": ((([1.0], W[1]), B), TypeError, ["tangent.weights[0]", "Tensor", "list"]),
    "a bias a number": ((W, (1.0, None)), TypeError, ["tangent.biases[0]", "Tensor", "float"]),
    "a weight's shape": (
        ((W[0].T, W[1]), B),
        RuntimeError,
        ["tangent.weights[0]", "(4, 3)", "(3, 4)"],
    ),
    "a bias's shape": ((W, (B[0][:1], None)), RuntimeError, ["tangent.biases[0]", "(4,)", "(1,)"]),
    "a bias that is not there": (
        (W, (B[0], torch.ones(2))),
        ValueError,
        ["tangent.biases[1]", "None", "no bias"],
    ),
    "a weight's dtype": (
        ((W[0], W[1].double()), B),
        RuntimeError,
        ["tangent.weights[1]", "float32", "float64"],
    ),
    "a bias's dtype": (
        (W, (B[0].half(), None)),
        RuntimeError,
        ["tangent.biases[0]", "float32", "float16"],
    ),
    "a weight elsewhere": (
        ((W[0].to("meta"), W[1]), B),
        RuntimeError,
        ["tangent.weights[0]", "cpu", "meta"],
    ),
}


@pytest.mark.parametrize("product", ["jvp", "gauss_newton"])
@pytest.mark.parametrize(("tangent", "error", "words"), TANGENTS.values(), ids=list(TANGENTS))
def test_bad_tangents(tangent, error, words, product):
    def call():
        linear = linearize(torch.ones(5, 3), W, B)
        return getattr(linear, product)(tangent)

    under_every_backend(call, error, words)


def test_a_bias_for_a_network_without():
    tangent = W, (torch.ones(4), None)
    call = lambda: linearize(torch.ones(5, 3), W).jvp(tangent)  # noqa: E731
    under_every_backend(call, ValueError, ["tangent.biases[0]", "None", "no bias"])


GRADIENTS = {
    "None": (None, TypeError, ["grad_output", "Tensor", "NoneType"]),
    "a list": ([1.0], TypeError, ["grad_output", "Tensor", "list"]),
    "too wide": (torch.ones(5, 3), RuntimeError, ["grad_output", "(5, 2)", "(5, 3)"]),
    "to broadcast": (torch.ones(2), RuntimeError, ["grad_output", "(5, 2)", "(2,)"]),
    "flat": (torch.ones(10), RuntimeError, ["grad_output", "(5, 2)", "(10,)"]),
    "float64": (torch.ones(5, 2).double(), RuntimeError, ["grad_output", "float32", "float64"]),
    "elsewhere": (torch.ones(5, 2).to("meta"), RuntimeError, ["grad_output", "cpu", "meta"]),
}


@pytest.mark.parametrize(("grad", "error", "words"), GRADIENTS.values(), ids=list(GRADIENTS))
def test_bad_gradients_at_the_output(grad, error, words):
    call = lambda: linearize(torch.ones(5, 3), W, B).vjp(grad)  # noqa: E731
    under_every_backend(call, error, words)


TRANSFORMS = {
    "grad": lambda f, p: torch.func.grad(lambda p: f(p).sum())(p),
    "jvp": lambda f, p: torch.func.jvp(f, (p,), (p,)),
    "vmap": lambda f, p: torch.func.vmap(f)(torch.stack([p, p])),
}


def products_of(linear):
    """Functions of one tensor, which have no derivative, and the shape of that tensor."""
    return [
        ("jvp", lambda w: linear.jvp(((w, W[1]), B)), (4, 3)),
        ("jvp", lambda b: linear.jvp((W, (b, None))), (4,)),
        ("vjp", lambda u: linear.vjp(u).weights[0], (5, 2)),
        ("jvp", lambda w: linear.gauss_newton(((w, W[1]), B)).weights[0], (4, 3)),
    ]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
def test_transforms_are_refused(transform, which):
    """It must not return a derivative of 0."""

    def call():
        _, function, shape = products_of(linearize(torch.ones(5, 3), W, B))[which]
        return transform(function, torch.ones(shape))

    name = products_of(linearize(torch.ones(5, 3), W, B))[which][0]
    under_every_backend(call, RuntimeError, [name, "no derivative"])


@pytest.mark.parametrize("which", range(4))
def test_forward_mode_is_refused(which):
    def call():
        _, function, shape = products_of(linearize(torch.ones(5, 3), W, B))[which]
        return function(forward_ad.make_dual(torch.ones(shape), torch.ones(shape)))

    name = products_of(linearize(torch.ones(5, 3), W, B))[which][0]
    with forward_ad.dual_level():
        under_every_backend(call, RuntimeError, [name, "no derivative"])


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
def test_linearize_is_refused_under_transforms(transform):
    call = lambda: transform(lambda w: linearize(torch.ones(5, 3), [w, W[1]]).y, W[0])  # noqa: E731
    under_every_backend(call, RuntimeError, ["linearize", "no derivative"])


def test_its_class_is_public():
    assert type(linearize(torch.ones(5, 3), W, B)) is Linearization


# -- The norms of the rows' gradients -----------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("bias", ["all", "none", "some"])
@pytest.mark.parametrize("activation", support.ACTIVATIONS, ids=str)
@pytest.mark.parametrize("sizes", [[3, 2], [3, 4, 5, 2]], ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (0,), (2, 3)], ids=str)
def test_row_norms_are_those_of_the_rows_gradients(backend, shape, sizes, activation, bias):
    torch.manual_seed(0)
    weights, biases = integer_network(sizes, bias, requires_grad=False)
    if activation in support.SMOOTH:  # not all in the saturated regions
        weights = [weight / 4 for weight in weights]
    x, u = integers(*shape, sizes[0]), integers(*shape, sizes[-1])
    net = linearize(x, weights, biases, output_activation=activation)
    norms = net.row_norms(u)
    assert norms.shape == shape and norms.dtype == torch.float64
    of_rows = jacobian(x.reshape(-1, sizes[0]), weights, biases, output_activation=activation)
    u_rows = u.reshape(-1, sizes[-1])
    rows, magnitudes = (
        [torch.einsum("no,no...->n...", u, entry).flatten(1) for entry in entries]
        for u, entries in [
            (u_rows, by_name(of_rows).values()),
            (u_rows.abs(), [entry.abs() for entry in by_name(of_rows).values()]),
        ]
    )
    expected = torch.cat(rows, 1).norm(dim=1).reshape(shape)
    gradients = by_name(net.row_gradients(u)).values()
    # The same terms in another order, through few layers of few units.
    error = gamma(2 * len(sizes), 5)
    for actual, row, magnitude in zip(gradients, rows, magnitudes, strict=True):
        assert_within(actual.flatten(1), row, 2 * error * magnitude)
    # Few roundings of positive terms: squares, sums of at most 40, roots, twice.
    torch.testing.assert_close(norms, expected, rtol=100 * torch.finfo(norms.dtype).eps, atol=0)
    assert (norms > 0).sum() * 2 >= norms.numel()


def test_row_gradients_have_their_own_memory(backend):
    net, u = linearize(integers(5, 3), [integers(2, 3)], [integers(2)]), integers(5, 2)
    kept = u.clone()
    for entry in by_name(net.row_gradients(u)).values():
        entry.fill_(7)
    assert torch.equal(u, kept)


def test_row_norms_of_16_bits_do_not_overflow(backend):
    x = torch.full((1, 4), 200.0, dtype=torch.float16)
    weights = [torch.eye(4, dtype=torch.float16), torch.eye(4, dtype=torch.float16)]
    norms = linearize(x, weights).row_norms(torch.full((1, 4), 40000.0, dtype=torch.float16))
    # |a| = 400 and |delta| = 80000 in both layers; the largest float16 is 65504
    torch.testing.assert_close(norms, torch.tensor([400 * 80000 * 2**0.5]))


def test_clipped_gradients_from_norms(backend):
    """As in differentially private training: each row's gradient is clipped, and none is stored."""
    torch.manual_seed(0)
    weights, biases = integer_network([3, 4, 2], "all", requires_grad=False)
    x, u = integers(6, 3), integers(6, 2)
    net = linearize(x, weights, biases)
    norms = net.row_norms(u)
    factors = (norms.median() / norms).clamp(max=1)
    actual = net.vjp(factors[:, None] * u)
    rows = [linearize(x[n : n + 1], weights, biases).vjp(u[n : n + 1]) for n in range(6)]
    for name, total in by_name(actual).items():
        expected = sum(factor * by_name(row)[name] for factor, row in zip(factors, rows))
        # 6 terms and a factor each, in two orders
        bound = sum(factor * by_name(row)[name].abs() for factor, row in zip(factors, rows))
        assert_within(total, expected, 2 * gamma(2, 6) * bound, name)


@pytest.mark.parametrize("bad", [None, torch.ones(5, 3), torch.ones(5, 2)], ids=str)
def test_row_norms_of_something_else(bad):
    net = linearize(integers(5, 3), [integers(2, 3)])
    with pytest.raises(TypeError if bad is None else RuntimeError, match="grad_output must"):
        net.row_norms(bad)
