"""recompute=True keeps only x and the parameters of the forward pass, and
`relu_mlp::recompute_backward` computes the rest again.
"""

import itertools
import random

import pytest
import torch
from torch._subclasses import FakeTensorMode

import relu_mlp
import support
from relu_mlp import ops, reference

R = torch.ops.relu_mlp
SIZES = [5, 7, 6, 3]
ACTIVATIONS = list(reference.ACTIVATIONS)
every_dtype = pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def implementation(backend):
    return ops.extension if backend == "extension" else reference


def all_needs(layers):
    return map("".join, itertools.product("01", repeat=1 + 2 * layers))


def integer_network(sizes, dtype, rows=4, bias="all"):
    """x, weights, biases (without elements where missing) and grad_output."""
    weights, biases = support.integer_network(
        sizes, bias, dtype=dtype, requires_grad=False, largest=1
    )
    biases = [ops.NO_TENSOR.to(dtype) if b is None else b for b in biases or []]
    x = support.integers(rows, sizes[0], dtype=dtype)
    return x, weights, biases, support.integers(rows, sizes[-1], dtype=dtype)


def both(backend, x, weights, biases, grad_output, activation, needs):
    """The gradients by recompute_backward, and by backward from the tensors that forward saved."""
    backend = implementation(backend)
    y, hidden = backend.forward(x, weights, biases, activation, True)
    kept = reference.is_kept(activation, needs)
    saved = list(itertools.compress([x, y, *weights, *hidden], kept))
    return (
        backend.recompute_backward(grad_output, x, weights, biases, activation, needs),
        backend.backward(grad_output, saved, activation, needs),
    )


@every_dtype
@every_activation
def test_equals_backward_for_all_needs(backend, activation, dtype):
    """Exactly equal, because sums of small integers are exact and phi is the same function of z."""
    *network, grad_output = integer_network(SIZES, dtype)
    for needs in all_needs(len(SIZES) - 1):
        again, kept = both(backend, *network, grad_output, activation, needs)
        assert len(again) == needs.count("1")
        for actual, expected in zip(again, kept, strict=True):
            support.assert_same(actual, expected, needs)


@pytest.mark.covering
@every_dtype
@pytest.mark.parametrize("bias", ["all", "none", "some"])
@pytest.mark.parametrize("leading", [[], [1], [0], [2, 3], [700]], ids=str)
def test_equals_backward_for_all_shapes(backend, leading, bias, dtype):
    x, weights, biases, _ = integer_network(SIZES, dtype, bias=bias)
    x = support.integers(*leading, SIZES[0], dtype=dtype)
    grad_output = support.integers(*leading, SIZES[-1], dtype=dtype)
    has_bias = "".join("01"[b.numel() > 0] for b in biases) or "000"
    again, kept = both(backend, x, weights, biases, grad_output, "relu", "1111" + has_bias)
    assert again[0].shape == x.shape
    for actual, expected in zip(again, kept, strict=True):
        support.assert_same(actual, expected)


@pytest.mark.covering
@every_dtype
@pytest.mark.parametrize("activation", support.ACTIVATIONS)
@pytest.mark.parametrize("rows", [6, 500])
def test_within_the_bounds_of_rounding(backend, rows, activation, dtype):
    weights, biases = support.make_network(SIZES, dtype=dtype)
    x = torch.randn(rows, SIZES[0]).to(dtype)
    grad_output = torch.randn(rows, SIZES[-1]).to(dtype)
    y, hidden = support.hidden_of(implementation(backend), x, weights, biases, activation)
    exact = support.Exact(x, weights, biases, activation, hidden, y).backward(grad_output)
    grads = implementation(backend).recompute_backward(
        grad_output, x, weights, biases, activation or "none", "1111111"
    )
    for (name, _), grad in zip(support.leaves(x, weights, biases).items(), grads, strict=True):
        exact[name].check(grad, name)


# -- Malformed calls ---------------------------------------------------------------------

MALFORMED = {  # the argument, how it is broken, and the words of the message
    "grad_output too wide": (
        0,
        lambda g: g.repeat(1, 2),
        r"grad_output must have the output's shape \(4, 3\), got \(4, 6\)",
    ),
    "grad_output of other rows": (0, lambda g: g[:2], r"grad_output must.*got \(2, 3\)"),
    "grad_output of rank 0": (0, lambda g: g[0, 0], r"grad_output must have .*\(\)"),
    "grad_output float32": (0, torch.Tensor.float, "grad_output must be float64 like x"),
    "x too narrow": (1, lambda x: x[:, 1:], r"weights\[0\] must have shape"),
    "x integer": (1, torch.Tensor.long, "x must be float64, float32, bfloat16 or float16"),
    "no weights": (2, lambda weights: [], "weights must have at least one entry, got none"),
    "a weight too many": (2, lambda weights: [*weights, weights[-1]], "biases must have one"),
    "a bias too short": (3, lambda b: [b[0], b[1][1:], b[2]], r"biases\[1\] must have shape"),
    "unknown activation": (4, lambda _: "gelu", "output_activation must be.*got 'gelu'"),
}


@pytest.mark.parametrize(("at", "change", "words"), MALFORMED.values(), ids=list(MALFORMED))
def test_malformed(backend, at, change, words):
    *network, grad_output = integer_network(SIZES, torch.float64)
    call = [grad_output, *network, "tanh", "1111111"]
    implementation(backend).recompute_backward(*call)
    call[at] = change(call[at])
    with pytest.raises(RuntimeError, match=words):
        implementation(backend).recompute_backward(*call)


@pytest.mark.skipif(ops.LIBRARY_PATH is None, reason="the reference trusts its one caller")
@pytest.mark.parametrize("needs", ["", "1", "11111", "111111", "111111111", "11111x1"])
def test_malformed_needs(needs):
    *network, grad_output = integer_network(SIZES, torch.float64)
    with pytest.raises(RuntimeError, match=f"needs must .* characters.*, got '{needs}'"):
        R.recompute_backward(grad_output, *network, "none", needs)


# -- The operator as PyTorch sees it -------------------------------------------------------


def some_calls(dtype=torch.float64):
    r = random.Random(0)
    for sizes, bias, activation in (
        ([3, 2], "none", "none"),
        ([3, 2], "all", "relu"),
        ([3, 6, 2], "all", "sigmoid"),
        ([3, 6, 1, 2], "some", "tanh"),
    ):
        for rows in (4, 0):
            *network, grad_output = integer_network(sizes, dtype, rows, bias)
            has_bias = "".join("01"[b.numel() > 0] for b in network[2]) or "0" * (len(sizes) - 1)
            for needs in (
                "1" * len(sizes) + has_bias,
                "".join(r.choices("01", k=len(sizes))) + "0" * (len(sizes) - 1),
            ):
                yield grad_output, *network, activation, needs


@pytest.mark.slow
def test_opcheck():
    for call in some_calls():
        torch.library.opcheck(R.recompute_backward.default, call)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_fake_kernel(dtype, transposed):
    """The same shapes, strides and dtypes as the real one, as fake and as meta tensors."""

    def convert(argument, to):
        if isinstance(argument, list):
            return [convert(item, to) for item in argument]
        return to(argument) if isinstance(argument, torch.Tensor) else argument

    for call in some_calls(dtype):
        if transposed:
            call = convert(
                list(call), lambda t: t.mT.contiguous().mT if t.dim() == 2 else t.contiguous()
            )
        facts = [
            (t.shape, t.stride(), t.dtype, t.storage_offset()) for t in R.recompute_backward(*call)
        ]
        with FakeTensorMode() as mode:
            fake = R.recompute_backward(*convert(list(call), mode.from_tensor))
        meta = R.recompute_backward(*convert(list(call), lambda t: t.to("meta")))
        for other in (fake, meta):
            assert facts == [(t.shape, t.stride(), t.dtype, t.storage_offset()) for t in other]


def test_has_no_derivative_and_says_so():
    *network, grad_output = integer_network(SIZES, torch.float64)
    network[0].requires_grad_()
    with pytest.raises(RuntimeError, match=r"relu_mlp::recompute_backward has no derivative"):
        R.recompute_backward(grad_output, *network, "none", "1111111")


# -- What runs, and what is kept -----------------------------------------------------------


@pytest.mark.parametrize("activation", support.ACTIVATIONS)
def test_one_call_each_way(backend, activation):
    """The forward operator runs once. The backward pass is one call that recomputes internally."""
    net = relu_mlp.ReluMLP(5, [7, 6], 3, output_activation=activation, recompute=True)
    x = torch.randn(4, 5, requires_grad=True)
    one = {"forward": 1, "backward": 0, "loss_and_grads": 0, "native": 0}
    with support.count_calls() as counts:
        y = net(x)
        assert counts == one
        for backwards in (1, 2):
            y.sum().backward(retain_graph=True)
            assert counts == {**one, "backward": backwards}


@pytest.mark.parametrize("activation", support.ACTIVATIONS)
def test_keeps_x_and_the_parameters_and_nothing_else(backend, activation):
    """Nothing beside them, however wide the hidden layers are."""
    x = torch.randn(64, 5, requires_grad=True)
    for recompute in (True, False):
        net = relu_mlp.ReluMLP(5, [70, 60], 3, output_activation=activation, recompute=recompute)
        given = {t.untyped_storage().data_ptr() for t in (x, *net.parameters())}
        with support.saved_tensors() as saved:
            net(x)
        beside = sum(t.numel() for t in saved if t.untyped_storage().data_ptr() not in given)
        assert beside == (0 if recompute else 64 * (70 + 60 + 3 * (activation is not None)))


@every_dtype
def test_gives_the_gradients_of_a_network_that_keeps_everything(backend, dtype):
    nets = [relu_mlp.ReluMLP(5, [7, 6], 3, recompute=r).to(dtype) for r in (True, False)]
    x = support.integers(4, 5, dtype=dtype)
    for net in nets:
        support.integers_(net)
        net(x).backward(support.integers(4, 3, dtype=dtype).fill_(1))
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        support.assert_same(one.grad, other.grad)


@pytest.mark.parametrize("activation", support.ACTIVATIONS)
def test_first_and_second_derivatives(backend, activation):
    while True:  # far from the kinks of the ReLUs
        weights, biases = support.make_network([3, 4, 4, 2], requires_grad=True)
        x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
        z = support.hidden_pre_activations(x, weights, biases)
        z.append(support.native_mlp(x, weights, biases))
        if min(t.abs().min() for t in z) > 1e-3:
            break

    def function(x, *parameters):
        return relu_mlp.relu_mlp(
            x, parameters[:3], parameters[3:], output_activation=activation, recompute=True
        )

    # as in test_operator_registration.py
    tolerances = {"eps": 1e-6, "atol": 1e-8, "rtol": 1e-8}
    inputs = (x, *weights, *biases)
    assert torch.autograd.gradcheck(function, inputs, **tolerances)
    assert torch.autograd.gradgradcheck(function, inputs, **tolerances)
