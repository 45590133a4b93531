"""`jacobian`: the derivative of every output with respect to every parameter, by hand."""

from collections import Counter

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import relu_mlp
import support
from relu_mlp import Parameters, jacobian, loss_and_grads
from support import (
    Bounded,
    assert_same,
    assert_within,
    by_name,
    gamma,
    hidden_pre_activations,
    integer_case,
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

SIZES = [[3, 2], [1, 1], [3, 4, 2], [2, 1, 1, 3], [5, 7, 6, 4, 3]]

# torch.jit is deprecated, and torch.func.jvp loads it.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def bounds_of(x, weights, biases, activation):
    """The largest distance of two computations of the Jacobian. No sum is over the rows."""
    longest = max(max(weight.shape) for weight in weights)
    error = 2 * gamma(2 * len(weights), longest)  # forward and backward through every layer
    magnitudes = jacobian_magnitudes(x, weights, biases, activation)
    return {name: error * magnitude for name, magnitude in magnitudes.items()}


def by_rows(x, weights, biases, activation):
    """`torch.autograd.functional.jacobian`, by name."""
    names = list(by_name((weights, biases)))

    def y(*tensors):
        given = dict(zip(names, tensors, strict=True))
        return support.native_mlp(
            x,
            [given[f"weights[{n}]"] for n in range(len(weights))],
            [given.get(f"biases[{n}]") for n in range(len(weights))],
            activation,
        )

    found = torch.autograd.functional.jacobian(y, tuple(by_name((weights, biases)).values()))
    return dict(zip(names, found, strict=True))


# -- Values --------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("bias", ["all", "none", "some"])
@pytest.mark.parametrize("activation", support.ACTIVATIONS)
def test_matches_torch_func(backend, activation, bias, sizes):
    x, weights, biases = make_case(sizes, 5, bias)
    found = by_name(jacobian(x, weights, biases, output_activation=activation))
    expected = native_jacobian(x, weights, biases, output_activation=activation)
    assert_within(found, expected, bounds_of(x, weights, biases, activation))


@pytest.mark.parametrize("bias", ["all", "none", "some"])
@pytest.mark.parametrize("activation", support.ACTIVATIONS)
def test_matches_torch_autograd(backend, activation, bias):
    x, weights, biases = make_case([3, 6, 4, 2], 5, bias)
    found = by_name(jacobian(x, weights, biases, output_activation=activation))
    expected = by_rows(x, weights, biases, activation)
    assert_within(found, expected, bounds_of(x, weights, biases, activation))


@pytest.mark.covering
@pytest.mark.parametrize("sizes", [[3, 2], [3, 4, 3, 1]], ids=str)
@pytest.mark.parametrize("bias", ["all", "none", "some"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
def test_has_the_bits_of_the_native_one(backend, dtype, activation, bias, sizes):
    """With integers. Many pre-activations are 0, where the derivative of a ReLU is 0."""
    x, weights, biases = integer_case(sizes, 16, bias, dtype)
    z = hidden_pre_activations(x, weights, biases)
    z.append(support.native_mlp(x, weights, biases))
    assert all((values == 0).any() for values in z)
    found = jacobian(x, weights, biases, output_activation=activation)
    expected = native_jacobian(x, weights, biases, output_activation=activation)
    assert_same(by_name(found), expected)


@pytest.mark.covering
@pytest.mark.parametrize(("sizes", "bias"), [([3, 2], "all"), ([7, 16, 5, 2], "some")], ids=str)
@pytest.mark.parametrize("activation", support.ACTIVATIONS)
@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
def test_against_float64(backend, dtype, activation, bias, sizes):
    """The backward pass for one output of one row gives an entry of the Jacobian."""
    x, weights, biases = make_case(sizes, 3, bias, dtype)
    found = by_name(jacobian(x, weights, biases, output_activation=activation))
    implementation = relu_mlp.functional.implementation_for(x)
    y, hidden = support.hidden_of(implementation, x, weights, biases, activation)
    for n in range(3):
        row = slice(n, n + 1)
        exact = support.Exact(x[row], weights, biases, activation, [a[row] for a in hidden], y[row])
        for o, one in enumerate(torch.eye(sizes[-1])):
            expected = exact.backward(one[None])
            for name, entry in found.items():
                assert entry.dtype == dtype
                expected[name].check(entry[n, o], f"{name}[{n}, {o}]")


def test_by_hand(backend):
    """y = v max(w x + b, 0) + c in three rows: on, at the kink, off."""
    x = torch.tensor([[3.0], [2.0], [1.0]])
    w, b, v, c = torch.tensor([[1.0]]), torch.tensor([-2.0]), torch.tensor([[5.0]]), torch.zeros(1)
    found = jacobian(x, [w, v], [b, c])
    assert found.weights[0].flatten().tolist() == [15, 0, 0]  # v x where the unit is on
    assert found.biases[0].flatten().tolist() == [5, 0, 0]
    assert found.weights[1].flatten().tolist() == [1, 0, 0]  # the hidden activation
    assert found.biases[1].flatten().tolist() == [1, 1, 1]


def test_document_004(backend):
    """For the linear model with intercept, J is the matrix of features. The gradient of the MSE,
    with the figures printed there, is J^T times 2/n (y - t).
    """
    x = torch.tensor([35.7, 55.9, 58.2, 81.9, 56.3, 48.9, 33.9, 21.8, 48.4, 60.4, 68.4])[:, None]
    target = torch.tensor([0.5, 14.0, 15.0, 28.0, 11.0, 8.0, 3.0, -4.0, 6.0, 13.0, 21.0])[:, None]
    weight, bias = torch.ones(1, 1), torch.zeros(1)
    features = torch.cat([torch.ones(11, 1), x], 1)
    found = jacobian(x, [weight], [bias])
    assert torch.equal(torch.cat([found.biases[0][:, 0], found.weights[0][:, 0, 0]], 1), features)

    u = 2 / 11 * (x - target)  # y is x
    result = loss_and_grads(x, target, [weight], [bias], loss="mse")
    # A sum of 11 products, each after three roundings, and half a unit in the last printed
    # digit.
    bound = 14 * torch.finfo(torch.float32).eps / 2 * (u.abs() * features).sum(0)
    printed = Bounded(torch.tensor([82.6000, 4517.2969]).double(), bound.double() + 0.5e-4)
    printed.check(torch.cat([result.biases[0], result.weights[0][0]]), "the gradient")
    printed.check((features.T @ u)[:, 0], "J^T u")


@pytest.mark.covering
@pytest.mark.parametrize("loss", ["sse", "half_sse", "mse"])
@pytest.mark.parametrize("bias", ["all", "none", "some"])
@pytest.mark.parametrize("activation", support.ACTIVATIONS)
def test_its_transpose_makes_the_gradient_of_a_loss(backend, activation, bias, loss):
    """grad L = J^T grad_y L, the identity of document 004."""
    x, weights, biases = make_case([3, 5, 4, 2], 6, bias)
    target = torch.randn(6, 2, dtype=torch.float64)
    y = support.native_mlp(x, weights, biases, activation)
    u = {"sse": 2, "half_sse": 1, "mse": 2 / 12}[loss] * (y - target)
    found = by_name(jacobian(x, weights, biases, output_activation=activation))
    expected = loss_and_grads(x, target, weights, biases, loss=loss, output_activation=activation)
    expected = by_name((expected.weights, expected.biases))
    magnitudes = jacobian_magnitudes(x, weights, biases, activation)
    # u was computed twice too: y, the difference from the target, the factor. Its error
    # is proportional to |y| + |target|, with |y| at most that of the majorant.
    a_y = majorant(x.abs(), [w.abs() for w in weights], absolute(biases)) + target.abs()
    a_u = (a_y if activation in (None, "relu") else 2 + target.abs()) * 2 + u.abs()
    error = 2 * gamma(3 * 3 + 2, 6 * 2)  # to y, backwards, and the sum over rows and outputs
    for name, entry in found.items():
        product = torch.einsum("no,no...->...", u, entry)
        magnitude = torch.einsum("no,no...->...", a_u, magnitudes[name])
        assert_within(product, expected[name], error * magnitude, name)


def absolute(biases):
    return biases and [None if bias is None else bias.abs() for bias in biases]


@pytest.mark.parametrize("activation", [None, "relu"])
def test_its_transpose_makes_the_very_bits_of_the_gradient(backend, activation):
    x, weights, biases = integer_case([3, 4, 3, 2], 8, "some")
    target = integers(8, 2)
    u = support.native_mlp(x, weights, biases, activation) - target
    found = by_name(jacobian(x, weights, biases, output_activation=activation))
    grads = loss_and_grads(
        x, target, weights, biases, loss="half_sse", output_activation=activation
    )
    product = {name: torch.einsum("no,no...->...", u, entry) for name, entry in found.items()}
    assert_same(product, by_name((grads.weights, grads.biases)))


# -- Special numbers and sizes -------------------------------------------------

SPECIAL = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("activation", support.ACTIVATIONS)
def test_nan_and_infinity_as_natively(backend, activation, special):
    """With one row, and with one output for sigmoid or tanh: natively, zeros of the other rows and
    outputs are multiplied too, and 0 times infinity or NaN is NaN.
    """
    outputs = 2 if activation in (None, "relu") else 1
    for where in ("x", "weights[0]", "weights[1]", "biases[0]", "biases[1]"):
        x, weights, biases = integer_case([3, 4, outputs], 1)
        tensor = leaves(x, weights, biases)[where]
        tensor.view(-1)[tensor.numel() // 2] = special
        found = by_name(jacobian(x, weights, biases, output_activation=activation))
        native = native_jacobian(x, weights, biases, output_activation=activation)
        if activation in (None, "relu"):
            assert_same(found, native, where)
        else:  # the same kinds of numbers in the same places
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                kinds = [{n: kind(t) for n, t in j.items()} for j in (found, native)]
                assert_same(*kinds, where)


@pytest.mark.parametrize("special", SPECIAL)
def test_rows_do_not_mix(backend, special):
    x, weights, biases = integer_case([3, 4, 2], 5)
    alone = [by_name(jacobian(x[n : n + 1], weights, biases)) for n in range(5)]
    x[1, 2] = special
    found = by_name(jacobian(x, weights, biases))
    for n in (0, 2, 3, 4):
        assert_same(
            {name: entry[n] for name, entry in found.items()},
            {k: v[0] for k, v in alone[n].items()},
        )
    assert not all(entry[1].isfinite().all() for entry in found.values())


@pytest.mark.covering
@pytest.mark.parametrize("bias", ["all", "some"])
@pytest.mark.parametrize("activation", support.ACTIVATIONS)
@pytest.mark.parametrize(
    ("sizes", "rows"),
    [([3, 4, 2], 0), ([3, 2], 0), ([0, 4, 2], 3), ([0, 2], 3), ([3, 0, 2], 3), ([3, 4, 0], 3)],
    ids=str,
)
def test_sizes_of_zero(backend, sizes, rows, activation, bias):
    x, weights, biases = make_case(sizes, rows, bias)
    found = by_name(jacobian(x, weights, biases, output_activation=activation))
    parameters = by_name((weights, biases))
    assert found.keys() == parameters.keys()
    for name, entry in found.items():
        assert entry.shape == (rows, sizes[-1], *parameters[name].shape)
        assert entry.isfinite().all()
    if rows and sizes[-1] and activation is None and bias == "all":
        last = f"biases[{len(weights) - 1}]"
        assert_same(found[last], torch.eye(2, dtype=torch.float64).expand(3, 2, 2))


# -- Arguments and results -----------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("sizes", [[3, 2], [5, 1, 4, 3]], ids=str)
@pytest.mark.parametrize("bias", ["all", "none", "some"])
@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
def test_structure(backend, dtype, bias, sizes):
    x, weights, biases = make_case(sizes, 5, bias, dtype)
    found = jacobian(x, weights, biases)
    assert type(found) is Parameters and found._fields == ("weights", "biases")
    assert type(found.weights) is tuple
    if biases is None:
        assert found.biases is None
    else:
        assert type(found.biases) is tuple
        assert [b is None for b in found.biases] == [b is None for b in biases]
    parameters = by_name((weights, biases))
    for name, entry in by_name(found).items():
        assert entry.shape == (5, sizes[-1], *parameters[name].shape)
        assert entry.dtype == dtype and entry.layout == torch.strided
        assert not entry.requires_grad and entry.grad_fn is None
    # A change of one entry changes no other.
    storages = {entry.untyped_storage().data_ptr() for entry in by_name(found).values()}
    assert len(storages) == len(parameters)


def test_all_biases_none_is_not_no_biases(backend):
    x, weights, _ = make_case([3, 4, 2], 5)
    assert jacobian(x, weights, [None, None]).biases == (None, None)
    assert jacobian(x, weights).biases is None


def test_any_sequences(backend):
    x, weights, biases = make_case([3, 4, 2], 5)
    expected = by_name(jacobian(x, weights, biases))
    for kind in (
        tuple,
        iter,
        lambda tensors: (tensor for tensor in tensors),
        torch.nn.ParameterList,
    ):
        assert_same(by_name(jacobian(x, kind(weights), kind(biases))), expected)


@pytest.mark.parametrize("strange", support.LAYOUTS)
def test_memory_layouts(backend, strange):
    x, weights, biases = integer_case([3, 4, 2], 5)
    expected = by_name(jacobian(x, weights, biases))
    strange_biases = [strange(b[None])[0] for b in biases]
    found = jacobian(strange(x), [strange(w) for w in weights], strange_biases)
    assert_same(by_name(found), expected)


def test_expanded_x(backend):
    x, weights, biases = integer_case([3, 4, 2], 1)
    one = by_name(jacobian(x, weights, biases))
    found = by_name(jacobian(x.expand(5, 3), weights, biases))
    assert_same(found, {name: entry.expand(5, *entry.shape[1:]) for name, entry in one.items()})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_grad_modes(backend, mode):
    x, weights, biases = make_case([3, 4, 2], 5)
    expected = by_name(jacobian(x, weights, biases))
    for tensor in leaves(x, weights, biases).values():
        tensor.requires_grad_()
    with mode():
        found = by_name(jacobian(x * 1, [w * 1 for w in weights], biases))
    assert_same(found, expected)
    assert not any(entry.requires_grad for entry in found.values())


def test_autocast_does_not_apply(backend):
    x, weights, biases = make_case([3, 4, 5, 2], 5, dtype=torch.float32)
    expected = by_name(jacobian(x, weights, biases))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(by_name(jacobian(x, weights, biases)), expected)


def test_leaves_its_arguments_alone(backend):
    x, weights, biases = make_case([3, 4, 2], 5)
    arguments = list(leaves(x, weights, biases).values())
    for tensor in arguments:
        tensor.requires_grad_().grad = torch.ones_like(tensor)
    before = snapshot(arguments)
    jacobian(x, weights, biases, output_activation="sigmoid")
    assert_unchanged(before)


# -- How it is computed --------------------------------------------------------


@pytest.mark.parametrize("activation", support.ACTIVATIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_one_forward_pass_and_one_product_for_each_layer_below(backend, sizes, activation):
    x, weights, biases = make_case(sizes, 4, "some")
    with support.count_calls() as counts:
        jacobian(x, weights, biases, output_activation=activation)
    layers = len(weights)
    assert counts == {"forward": 1, "backward": 0, "loss_and_grads": 0, "native": layers - 1}


@pytest.mark.parametrize("activation", support.ACTIVATIONS)
def test_no_loop_over_rows_or_outputs(backend, activation):
    """The number of operations does not depend on the sizes, and there is one product per layer."""
    counts = set()
    for rows, hidden, outputs in [(2, 3, 2), (7, 3, 2), (2, 3, 5), (9, 8, 11), (64, 4, 7)]:
        x, weights, biases = make_case([3, hidden, hidden, outputs], rows)
        with support.dispatched() as operations:
            jacobian(x, weights, biases, output_activation=activation)
        found = Counter(name for name, _ in operations)
        counts.add((sum(found.values()), sum(found[name] for name in support.PRODUCTS)))
    assert len(counts) == 1
    (_, products), layers = counts.pop(), 3
    assert products == layers - 1 + (layers if backend == "reference" else 0)


# -- Errors --------------------------------------------------------------------


@pytest.mark.parametrize("bad", NETWORKS.values(), ids=list(NETWORKS))
def test_bad_networks(bad):
    error, words = bad.expected_error(), bad.words
    if isinstance(bad.x, torch.Tensor) and bad.x.dim() != 2:
        words = ["x", "(rows, in_features)", str(tuple(bad.x.shape))]
    under_every_backend(lambda: jacobian(bad.x, bad.weights, bad.biases), error, words)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5, 3), (1, 1, 1, 3)], ids=str)
def test_x_is_no_matrix(shape):
    words = ["x", "(rows, in_features)", str(shape)]
    weights = [torch.ones(2, 3)]
    under_every_backend(lambda: jacobian(torch.ones(shape), weights), RuntimeError, words)


@pytest.mark.parametrize("activation", NO_ACTIVATIONS, ids=repr)
def test_unknown_activation(activation):
    words = ["output_activation", "None", "'relu'", "'sigmoid'", "'tanh'", repr(activation)]
    x, weights, _ = make_case([3, 4, 2], 5)
    call = lambda: jacobian(x, weights, output_activation=activation)  # noqa: E731
    under_every_backend(call, ValueError, words)


TRANSFORMS = {
    "grad": lambda f, p: torch.func.grad(lambda p: f(p).sum())(p),
    "jacrev": lambda f, p: torch.func.jacrev(f)(p),
    "jvp": lambda f, p: torch.func.jvp(f, (p,), (p,)),
    "vmap": lambda f, p: torch.func.vmap(f)(torch.stack([p, p])),
}


@pytest.mark.parametrize("which", ["x", "weight", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
def test_transforms_are_refused(transform, which):
    x, (weight,), (bias,) = make_case([3, 2], 5)
    given = {"x": x, "weight": weight, "bias": bias}

    def entry(tensor):
        tensors = {**given, which: tensor}
        return jacobian(tensors["x"], [tensors["weight"]], [tensors["bias"]]).weights[0]

    words = ["jacobian", "no derivative"]
    under_every_backend(lambda: transform(entry, given[which]), RuntimeError, words)


@pytest.mark.parametrize("which", ["x", "weight", "bias"])
def test_forward_mode_is_refused(which):
    x, (weight,), (bias,) = make_case([3, 2], 5)
    given = {"x": x, "weight": weight, "bias": bias}
    expected = jacobian(x, [weight], [bias])
    with forward_ad.dual_level():
        tensors = {
            **given,
            which: forward_ad.make_dual(given[which], torch.ones_like(given[which])),
        }
        call = lambda: jacobian(tensors["x"], [tensors["weight"]], [tensors["bias"]])  # noqa: E731
        under_every_backend(call, RuntimeError, ["jacobian", "no derivative"])
        # without a tangent it works
        assert_same(by_name(jacobian(x, [weight], [bias])), by_name(expected))
