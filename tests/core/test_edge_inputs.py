"""Inputs at the edges: every rank, sizes of 0 and 1, odd and large sizes, layouts that are not
contiguous, NaN and infinity, the kink, several threads, sums in half precision, and the dtypes
and contexts that take the native path.

Most networks have small integers, so both paths must give the same bits.
"""

import itertools
import math

import pytest
import torch

import support
from relu_mlp import ReluMLP, relu_mlp
from relu_mlp import backend as use_backend
from support import (
    assert_same,
    assert_within,
    first_order_bounds,
    gradients,
    integer_network,
    integers,
    leaves,
    native_mlp,
    outcome,
)

ACTIVATION = pytest.mark.parametrize("activation", support.ACTIVATIONS, ids=str)
BIAS = pytest.mark.parametrize("bias", ["all", "none", "some"])
EXACT_ACTIVATION = pytest.mark.parametrize("activation", [None, "relu"], ids=str)


def assert_like_native(x, weights, biases, named=None, grad_output=None, **settings):
    """y and all gradients have the bits of the native path. `named` holds the leaves.

    Returns y and the gradients by name.
    """
    named = leaves(x, weights, biases) if named is None else named
    activation = settings.get("output_activation")
    expected_y = native_mlp(x, weights, biases, output_activation=activation)
    if grad_output is None:
        grad_output = integers(*expected_y.shape).to(expected_y.dtype)
    y = relu_mlp(x, weights, biases, **settings)
    assert y.is_contiguous()
    assert_same(y, expected_y, "y")
    grads = gradients(y, named, grad_output)
    assert_same(grads, gradients(expected_y, named, grad_output), "gradients")
    return y, grads


# -- Sizes ------------------------------------------------------------------------


@pytest.mark.covering
@EXACT_ACTIVATION
@BIAS
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 3), (0, 3), (3, 0, 2)], ids=str)
def test_rank(backend, leading, bias, activation):
    x = integers(*leading, 3).requires_grad_()
    for recompute in (False, True):
        y, grads = assert_like_native(
            x, *integer_network([3, 4, 2], bias), output_activation=activation, recompute=recompute
        )
        assert y.shape == (*leading, 2) and grads["x"].shape == x.shape


@BIAS
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_sizes_of_0_and_1(backend, rows, bias):
    for sizes in itertools.product([0, 1, 2], repeat=3):
        for activation in (None, "relu"):
            x = integers(rows, sizes[0]).requires_grad_()
            assert_like_native(x, *integer_network(sizes, bias), output_activation=activation)
    for sizes in itertools.product([0, 1, 2], repeat=2):
        x = integers(rows, sizes[0]).requires_grad_()
        assert_like_native(x, *integer_network(sizes, bias))


@pytest.mark.covering
@ACTIVATION
@pytest.mark.parametrize("sizes", [(0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
def test_empty_sums(backend, dtype, sizes, activation):
    """With every activation and dtype: a sum of no terms is 0, or the bias."""
    for rows in (0, 2):
        weights, biases = integer_network(sizes, dtype=dtype)
        x = integers(rows, sizes[0], dtype=dtype).requires_grad_()
        named = leaves(x, weights, biases)
        y = relu_mlp(x, weights, biases, output_activation=activation)
        assert_same(y, native_mlp(x, weights, biases, output_activation=activation))
        for name, grad in gradients(y, named).items():
            assert grad.shape == named[name].shape and grad.dtype == dtype
            if rows == 0 or sizes[-1] == 0:
                assert not grad.any(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [3, 6, 42, 123, 431])
def test_odd_sizes(backend, rows, dtype):
    odd = [3, 6, 42, 123, 431]
    for size, hidden in itertools.product(odd, odd):
        weights, biases = integer_network([size, hidden, 6], dtype=dtype, largest=1)
        x = integers(rows, size, dtype=dtype, largest=1).requires_grad_()
        grad_output = integers(rows, 6, dtype=dtype, largest=1)
        # With -1, 0 and 1: |a_1| <= size + 1, |delta_1| <= 6, and no sum is larger than
        assert max(rows, hidden) * (size + 7) + 1 < 2**24, "float32 may round"
        assert_like_native(x, weights, biases, grad_output=grad_output)


@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
@ACTIVATION
def test_large_batch(backend, activation, dtype):
    """100 000 rows, whose hidden activations are far larger than any cache."""
    support.compare_with_float64([3, 4, 2], 100_000, "all", activation, dtype, backend)


# -- Layouts ----------------------------------------------------------------------

#: From (rows, cols) to the shape of a tensor and the function that makes a matrix of it.
LAYOUTS = {
    "transposed": lambda r, c: ((c, r), lambda t: t.T),
    "every other row": lambda r, c: ((2 * r, c), lambda t: t[::2]),
    "every other column": lambda r, c: ((r, 2 * c), lambda t: t[:, ::2]),
    "both, transposed": lambda r, c: ((2 * c, 2 * r), lambda t: t[::2, 1::2].T),
    "cut out": lambda r, c: ((r + 2, c + 2), lambda t: t[1:-1, 1:-1]),
    "one row": lambda r, c: ((1, c), lambda t: t.expand(r, c)),
    "one column": lambda r, c: ((r, 1), lambda t: t.expand(r, c)),
    "one element": lambda r, c: ((), lambda t: t.expand(r, c)),
    "overlapping rows": lambda r, c: ((r + c - 1,), lambda t: t.unfold(0, c, 1)),
    "diagonal": lambda r, c: ((r, r, c), lambda t: t.diagonal(0, 0, 1).T),
    "real parts": lambda r, c: ((r, c, 2), lambda t: torch.view_as_complex(t).real),
    "negative bit": lambda r, c: ((r, c, 2), lambda t: torch.view_as_complex(t).conj().imag),
    "negative bit, transposed": lambda r, c: (
        (c, r, 2),
        lambda t: torch.view_as_complex(t).conj().imag.T,
    ),
}

#: The package's own loops serve the first network, library calls the second.
LAYOUT_SIZES = {"small": (4, [3, 5, 2]), "large": (24, [20, 24, 20])}


def laid_out(kind, rows, cols):
    """A leaf that requires a gradient, and a matrix that is a view of it."""
    shape, view = LAYOUTS[kind](rows, cols)
    leaf = integers(*shape).requires_grad_()
    matrix = view(leaf)
    assert matrix.shape == (rows, cols)
    assert not matrix.is_contiguous() or matrix.is_neg()
    return leaf, matrix


@pytest.mark.parametrize("size", LAYOUT_SIZES)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_layout_of_x(backend, kind, size):
    rows, sizes = LAYOUT_SIZES[size]
    leaf, x = laid_out(kind, rows, sizes[0])
    for bias, recompute in itertools.product(["all", "none"], [False, True]):
        weights, biases = integer_network(sizes, bias)
        named = {**leaves(x, weights, biases), "x": leaf}
        assert_like_native(x, weights, biases, named, recompute=recompute)


@pytest.mark.parametrize("size", LAYOUT_SIZES)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_layout_of_a_weight(backend, kind, size):
    rows, sizes = LAYOUT_SIZES[size]
    for layer, bias in itertools.product([0, 1], ["all", "none"]):
        x = integers(rows, sizes[0]).requires_grad_()
        weights, biases = integer_network(sizes, bias)
        leaf, weights[layer] = laid_out(kind, *weights[layer].shape)
        named = {**leaves(x, weights, biases), f"weights[{layer}]": leaf}
        assert_like_native(x, weights, biases, named)


BIAS_LAYOUTS = {
    "every other": lambda n: ((2 * n,), lambda t: t[::2]),
    "column": lambda n: ((n, 3), lambda t: t[:, 1]),
    "one element": lambda n: ((1,), lambda t: t.expand(n)),
    "negative bit": lambda n: ((n, 2), lambda t: torch.view_as_complex(t).conj().imag),
}


@pytest.mark.parametrize("size", LAYOUT_SIZES)
@pytest.mark.parametrize("kind", BIAS_LAYOUTS)
def test_layout_of_a_bias(backend, kind, size):
    rows, sizes = LAYOUT_SIZES[size]
    for layer in (0, 1):
        x = integers(rows, sizes[0]).requires_grad_()
        weights, biases = integer_network(sizes)
        shape, view = BIAS_LAYOUTS[kind](sizes[layer + 1])
        leaf = integers(*shape).requires_grad_()
        biases[layer] = view(leaf)
        assert not biases[layer].is_contiguous() or biases[layer].is_neg()
        named = {**leaves(x, weights, biases), f"biases[{layer}]": leaf}
        assert_like_native(x, weights, biases, named)


@pytest.mark.parametrize("size", LAYOUT_SIZES)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_layout_of_grad_output(backend, kind, size):
    rows, sizes = LAYOUT_SIZES[size]
    x = integers(rows, sizes[0]).requires_grad_()
    for bias, activation in itertools.product(["all", "none"], [None, "relu"]):
        weights, biases = integer_network(sizes, bias)
        grad_output = laid_out(kind, rows, sizes[-1])[1].detach()
        assert_like_native(
            x, weights, biases, grad_output=grad_output, output_activation=activation
        )


@pytest.mark.parametrize("size", LAYOUT_SIZES)
@pytest.mark.parametrize("leading", [(), (4,), (2, 12), (2, 3, 4)], ids=str)
def test_contiguous_tensors_inside_others(backend, leading, size):
    """A row of a batch, a batch of a data set, parameters in one flat buffer: contiguous, but not
    at the start of their memory.
    """
    _, sizes = LAYOUT_SIZES[size]

    def inside(*shape):
        leaf = integers(math.prod(shape) + 5).requires_grad_()
        view = leaf[5:].view(shape)
        assert view.is_contiguous() and view.storage_offset() == 5
        return leaf, view

    pairs = {"x": inside(*leading, sizes[0])}
    for layer, (n_in, n_out) in enumerate(zip(sizes, sizes[1:])):
        pairs[f"weights[{layer}]"] = inside(n_out, n_in)
        pairs[f"biases[{layer}]"] = inside(n_out)
    x, *parameters = (view for _, view in pairs.values())
    named = {name: leaf for name, (leaf, _) in pairs.items()}
    grad_output = inside(*leading, sizes[-1])[1].detach()
    assert_like_native(x, parameters[::2], parameters[1::2], named, grad_output)


@pytest.mark.parametrize(
    "shape, view",
    [
        ((3, 2, 4), lambda t: t.permute(2, 1, 0)),
        ((3, 2, 5), lambda t: t[1:, :, 1:4]),
        ((5,), lambda t: t[1:4]),
        ((4, 2, 3), lambda t: t.transpose(0, 1)),
        ((2, 4, 6), lambda t: t[:, ::2, ::2]),
        ((2, 1, 3), lambda t: t.expand(2, 4, 3)),
        ((2, 3, 4, 5), lambda t: t.permute(0, 2, 3, 1)),  # pixels of an image
    ],
    ids=[
        "permuted",
        "cut out",
        "cut out of a vector",
        "batch second",
        "every other",
        "expanded",
        "channels last",
    ],
)
def test_layout_of_x_of_higher_rank(backend, shape, view):
    leaf = integers(*shape).requires_grad_()
    weights, biases = integer_network([3, 5, 2])
    named = {**leaves(leaf, weights, biases), "x": leaf}
    assert_like_native(view(leaf), weights, biases, named)


@BIAS
@pytest.mark.parametrize("leading", [(), (1,), (6,), (2, 3), (2, 1, 3)], ids=str)
def test_strides_are_the_native_ones(backend, leading, bias):
    """The strides of y and of every gradient, for contiguous inputs."""
    for sizes in ([3, 2], [3, 4, 2], [3, 1, 2], [1, 4, 1], [3, 4, 5, 2]):
        x = integers(*leading, sizes[0]).requires_grad_()
        weights, biases = integer_network(sizes, bias)
        named = leaves(x, weights, biases)
        y, expected_y = relu_mlp(x, weights, biases), native_mlp(x, weights, biases)
        assert y.stride() == expected_y.stride()
        grads, expected = gradients(y, named), gradients(expected_y, named)
        for name, grad in expected.items():
            assert grads[name].stride() == grad.stride(), f"{name}, sizes {sizes}"


# -- NaN and infinity -------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@ACTIVATION
@pytest.mark.parametrize("size", LAYOUT_SIZES)
@pytest.mark.parametrize(
    "name", ["x", "weights[0]", "weights[1]", "biases[0]", "biases[1]", "grad"]
)
def test_nan_and_infinity_pass_as_natively(backend, name, size, activation, value):
    rows, sizes = LAYOUT_SIZES[size]
    weights, biases = integer_network(sizes)
    x = integers(rows, sizes[0]).requires_grad_()
    grad_output = integers(rows, sizes[-1])
    named = leaves(x, weights, biases)
    # Finite results contain none of the infinite terms, so their bound is that of
    # the network with a 0 in their place.
    target = {**named, "grad": grad_output}[name].detach().flatten()
    target[1] = 0
    bounds = first_order_bounds(x, weights, biases, activation, grad_output)
    target[1] = value

    for recompute in (False, True):
        y = relu_mlp(x, weights, biases, output_activation=activation, recompute=recompute)
        expected_y = native_mlp(x, weights, biases, output_activation=activation)
        if activation in support.THAT_SAVE_Y:
            assert_same(y, expected_y, "y")
        else:  # a function of the library's own, which may round differently from PyTorch's
            torch.testing.assert_close(y, expected_y, rtol=1e-14, atol=0, equal_nan=True)
        actual = gradients(y, named, grad_output)
        expected = gradients(expected_y, named, grad_output)
        if math.isnan(value):  # a mask or an activation may absorb an infinity
            assert not all(t.isfinite().all() for t in [expected_y, *expected.values()])
        for key, grad in expected.items():
            finite = grad.isfinite()
            assert_same(actual[key][~finite], grad[~finite], f"{key}, not finite")
            assert_within(actual[key][finite], grad[finite], bounds[key][finite], key)


def test_nan_passes_the_relu_both_ways(backend):
    """Stated without the native path: relu(NaN) is NaN, and its gradient passes through."""
    x = torch.tensor([[math.nan]], dtype=torch.float64)
    weights = [torch.ones(1, 1, dtype=torch.float64), 3 * torch.ones(1, 1, dtype=torch.float64)]
    biases = [torch.zeros(1, dtype=torch.float64, requires_grad=True), None]
    y = relu_mlp(x, weights, biases)
    assert y.isnan().all()
    y.backward(torch.full_like(y, 2))
    assert biases[0].grad.item() == 6


@pytest.mark.parametrize("size", LAYOUT_SIZES)
def test_infinite_gradient_at_a_masked_unit_is_0(backend, size):
    """The mask selects, because inf * 0 would be NaN. At a hidden unit and at the output."""
    rows, sizes = LAYOUT_SIZES[size]
    x = torch.ones(rows, sizes[0], dtype=torch.float64)
    weights = [torch.ones(n, m, dtype=torch.float64) for m, n in zip(sizes, sizes[1:])]
    biases = [torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in sizes[1:]]
    with torch.no_grad():
        biases[0][0] = -2 * sizes[0]  # off
        biases[0][1] = -sizes[0]  # exactly at 0
    grad_output = torch.full((rows, sizes[-1]), math.inf, dtype=torch.float64)
    _, grads = assert_like_native(x, weights, biases, grad_output=grad_output)
    assert grads["biases[0]"].tolist() == [0, 0] + [math.inf] * (sizes[1] - 2)

    with torch.no_grad():
        biases[1][0] = -(2.0**20)  # off
    _, grads = assert_like_native(
        x, weights, biases, grad_output=grad_output, output_activation="relu"
    )
    assert grads["biases[1]"].tolist() == [0] + [math.inf] * (sizes[-1] - 1)


@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
def test_gradient_at_exactly_0_is_0(backend, dtype):
    x = torch.tensor([[1.0, 2.0]], dtype=dtype, requires_grad=True)
    weights = [torch.tensor([[2.0, -1.0], [2.0, 1.0]], dtype=dtype, requires_grad=True)]
    weights.append(torch.tensor([[5.0, 1.0], [0.0, 0.0]], dtype=dtype, requires_grad=True))
    # z_1 = (0, 4), z_2 = (4, 0)
    _, grads = assert_like_native(
        x,
        weights,
        None,
        grad_output=torch.tensor([[1.0, 7.0]], dtype=dtype),
        output_activation="relu",
    )
    assert grads["weights[0]"].tolist() == [[0, 0], [1, 2]]
    assert grads["weights[1]"].tolist() == [[0, 4], [0, 0]]
    assert grads["x"].tolist() == [[2, 1]]


# -- Threads ----------------------------------------------------------------------


@pytest.fixture
def with_threads():
    """Calls a function with a given number of threads."""
    before = torch.get_num_threads()

    def call(threads, function):
        torch.set_num_threads(threads)
        return function()

    yield call
    torch.set_num_threads(before)


# The reference uses PyTorch's products. MKL's may differ between numbers of threads, even for
# so few elements, on processors that are not Intel's.
@pytest.mark.skipif("extension" not in support.BACKENDS, reason="a promise of the extension")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(64, 3, 2, 1), (1, 8, 64, 64, 4), (33, 7, 17, 5)], ids=str)
def test_threads_change_nothing_in_small_networks(with_threads, sizes, dtype):
    rows, *sizes = sizes
    weights, biases = support.make_network(sizes, dtype=dtype, requires_grad=True)
    x = torch.randn(rows, sizes[0], dtype=dtype, requires_grad=True)

    def run():
        y = relu_mlp(x, weights, biases, output_activation="tanh")
        return {"y": y.detach(), **gradients(y, leaves(x, weights, biases))}

    with use_backend("extension"):
        assert_same(with_threads(2, run), with_threads(1, run))


def test_threads_do_not_change_the_bias_gradient(backend, with_threads):
    """The sum is over so many rows that several threads compute it."""
    x = torch.zeros(100_000, 1)
    bias = torch.zeros(3, requires_grad=True)
    grad_output = torch.randn(100_000, 3)

    def run():
        y = relu_mlp(x, [torch.zeros(3, 1)], [bias], output_activation="sigmoid")
        return gradients(y, {"bias": bias}, grad_output)

    assert_same(with_threads(2, run), with_threads(1, run))


# -- Sums in half precision -------------------------------------------------------


@pytest.mark.parametrize("expanded", [True, False], ids=["stride 0", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_over_rows_are_not_made_in_half_precision(backend, dtype, expanded):
    """70 000 equal terms: float32 sums them exactly, half precision stops early."""
    rows = 70_000
    term = torch.tensor(1 / 16, dtype=dtype)  # so that float16 can hold the sum
    expected = torch.tensor(rows / 16, dtype=torch.float64).to(dtype)
    assert expected < torch.finfo(dtype).max
    for features, outputs in [(1, 1), (3, 2), (2, 5)]:
        x = torch.ones(rows, features, dtype=dtype)
        weight = torch.zeros(outputs, features, dtype=dtype, requires_grad=True)
        bias = torch.zeros(outputs, dtype=dtype, requires_grad=True)
        grad_output = term.expand(rows, outputs)
        y = relu_mlp(x, [weight], [bias])
        y.backward(grad_output if expanded else grad_output.contiguous())
        assert_same(bias.grad, expected.expand(outputs), "bias")
        assert_same(weight.grad, expected.expand(outputs, features).clone(), "weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_over_features_are_not_made_in_half_precision(backend, dtype):
    features = 70_000
    expected = torch.tensor(features / 16, dtype=torch.float64).to(dtype)
    x = torch.ones(2, features, dtype=dtype)
    weight = torch.full((3, features), 1 / 16, dtype=dtype)
    assert_same(relu_mlp(x, [weight]), expected.expand(2, 3).clone())


# -- What takes the native path ---------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("leading", [(3,), (2, 3)], ids=str)
@pytest.mark.parametrize("activation", support.THAT_SAVE_Y, ids=str)
def test_integers(backend, activation, leading, dtype):
    """Integers have no gradient. y equals that of the native path."""
    x = torch.randint(0, 3, (*leading, 3), dtype=dtype)
    weights = [torch.randint(0, 3, shape, dtype=dtype) for shape in [(4, 3), (2, 4)]]
    biases = [torch.randint(0, 3, (n,), dtype=dtype) for n in (4, 2)]
    for given in (biases, None):
        expected = native_mlp(x, weights, given, output_activation=activation)
        assert_same(relu_mlp(x, weights, given, output_activation=activation), expected)


ALL_DTYPES = [*support.DTYPES, torch.int64, torch.bool, torch.complex64]


@pytest.mark.covering
@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("x_dtype", ALL_DTYPES, ids=str)
def test_mixed_dtypes(backend, x_dtype, depth, rows):
    """Nothing is promoted: an error where it is an error natively, otherwise the same result."""
    x = torch.ones(rows, 3).to(x_dtype)
    for first, last, bias in itertools.product(ALL_DTYPES, repeat=3):
        weights = [torch.ones(4, 3).to(first), torch.ones(2, 4).to(last)][:depth]
        biases = [torch.ones(4).to(bias), None][:depth]
        expected = outcome(native_mlp, x, weights, biases)
        assert_same(outcome(relu_mlp, x, weights, biases), expected, f"{first}, {last}, {bias}")


def test_module_and_input_of_different_dtypes(backend):
    net = ReluMLP(3, 4, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float32"):
        net(torch.ones(2, 3))
