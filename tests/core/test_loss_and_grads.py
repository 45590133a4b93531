"""`loss_and_grads`: the loss and every gradient in one call, without a graph."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import support
from relu_mlp import LossAndGrads, loss_and_grads, ops, reference, relu_mlp
from support import Bounded, make_case_with_target

#: Nothing here depends on whether the native node records a graph.
backend = support.backend_fixture(support.BACKENDS)

LOSSES = {
    "sse": lambda y, t: (y - t).square().sum(),
    "half_sse": lambda y, t: (y - t).square().sum() / 2,
    "mse": F.mse_loss,
}
NETWORKS = [  # sizes, leading sizes of x
    ([3, 2], [5]),
    ([7, 1], []),
    ([3, 6, 2], [2, 3]),
    ([42, 17, 16, 3], [33]),
    ([16, 33, 1, 5, 4], [2, 1, 3]),
]


def by_autograd(x, target, weights, biases, loss, activation, network=support.native_mlp):
    """Loss and gradients by autograd, in the structure of the named tuple."""
    weights = [w.detach().clone().requires_grad_() for w in weights]
    if biases is not None:
        biases = [None if b is None else b.detach().clone().requires_grad_() for b in biases]
    y = network(x.detach(), weights, biases, output_activation=activation)
    value = LOSSES[loss](y, target)
    value.backward()
    grads = None if biases is None else tuple(None if b is None else b.grad for b in biases)
    return LossAndGrads(value.detach(), tuple(w.grad for w in weights), grads)


def named(result):
    """The tensors of a LossAndGrads by name, as in `support.Exact.backward`."""
    tensors = {"loss": result.loss}
    for kind in ("weights", "biases"):
        for layer, grad in enumerate(getattr(result, kind) or ()):
            if grad is not None:
                tensors[f"{kind}[{layer}]"] = grad
    return tensors


def expected(x, target, weights, biases, loss, activation, backend):
    """The results in float64 with bounds, by name."""
    implementation = ops.extension if backend == "extension" else reference
    rows = reference.as_matrix(x.detach())
    y, hidden = support.hidden_of(implementation, rows, weights, biases, activation)
    exact = support.Exact(rows, weights, biases, activation, hidden, y)
    u, count = exact.u, y.numel()
    scale = {"sse": 1.0, "half_sse": 0.5, "mse": 1 / max(1, count)}[loss]

    # y - t is rounded, and stored by the reference. Its square is rounded and
    # stored, their sum and its product with the scale are stored.
    t = target.double().reshape(exact.y.value.shape)
    error = exact.stored(Bounded(exact.y.value - t, exact.y.bound))
    size = error.value.abs() + error.bound
    square = exact.stored(
        Bounded(error.value**2, (error.value.abs() + size) * error.bound + u * size**2)
    )
    total = exact.stored(
        Bounded(
            square.value.sum(),
            square.bound.sum() + exact.gamma(count) * (square.value + square.bound).sum(),
        )
    )
    # 3 u: 1/count, its conversion, the product.
    value = Bounded(
        scale * total.value, scale * (total.bound + 3 * u * (total.value + total.bound))
    )
    results = {"loss": exact.stored(value)}

    # The gradient at y is 2 scale (y - t).
    g = Bounded(2 * scale * error.value, 2 * scale * (error.bound + 3 * u * size))
    g = exact.stored(g)
    results |= exact.backward(g.value)
    del results["x"]
    # The effect of an error in the gradient at y on the others: the backward pass
    # of the absolute values. Twice that covers the roundings of the pass itself.
    spread = (
        2 * g.bound * (support.SMOOTH[activation].steepest if activation in support.SMOOTH else 1)
    )
    for layer in reversed(range(len(weights))):
        a = exact.a[layer]
        results[f"weights[{layer}]"].bound += spread.T @ (a.value.abs() + a.bound)
        results[f"biases[{layer}]"].bound += spread.sum(0)
        spread = spread @ exact.weights[layer].abs()
        if layer:
            spread = spread * exact.masks[layer - 1]
    return results


def check(actual, bounds):
    """Every tensor of `actual`, a dict by name, is within its bounds."""
    for name, tensor in actual.items():
        bounds[name].check(tensor, name)


@pytest.mark.covering
@pytest.mark.parametrize(("sizes", "leading"), NETWORKS, ids=str)
@pytest.mark.parametrize("bias", ["all", "none", "some"])
@pytest.mark.parametrize("activation", support.ACTIVATIONS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
def test_values(backend, dtype, loss, activation, bias, sizes, leading):
    x, target, weights, biases = make_case_with_target(sizes, leading, bias, dtype)
    result = loss_and_grads(x, target, weights, biases, loss=loss, output_activation=activation)
    bounds = expected(x, target, weights, biases, loss, activation, backend)
    native = by_autograd(x, target, weights, biases, loss, activation)
    assert named(result).keys() == named(native).keys()
    assert {tensor.dtype for tensor in named(result).values()} == {dtype}
    assert result.loss.shape == ()
    check(named(result), bounds)
    if dtype == torch.float64:
        # both are within the bounds of the exact value
        twice = {n: Bounded(t, 2 * bounds[n].bound) for n, t in named(native).items()}
        check(named(result), twice)


@pytest.mark.parametrize("bias", ["all", "none", "some"])
def test_structure(backend, bias):
    x, target, weights, biases = make_case_with_target([3, 6, 4, 2], [5], bias, torch.float32)
    result = loss_and_grads(x, target, weights, biases)
    assert type(result) is LossAndGrads
    assert result._fields == ("loss", "weights", "biases")
    assert type(result.weights) is tuple
    assert [grad.shape for grad in result.weights] == [w.shape for w in weights]
    assert all(grad.is_contiguous() for grad in result.weights)
    if biases is None:
        assert result.biases is None
    else:
        assert type(result.biases) is tuple
        assert [grad is None for grad in result.biases] == [b is None for b in biases]
        assert all(
            g.shape == b.shape for g, b in zip(result.biases, biases, strict=False) if b is not None
        )


def test_all_biases_none_is_not_no_biases(backend):
    x, target, weights, _ = make_case_with_target([3, 6, 2], [5], "none", torch.float32)
    assert loss_and_grads(x, target, weights, [None, None]).biases == (None, None)
    assert loss_and_grads(x, target, iter(weights), iter([None, None])).biases == (None, None)


def test_no_graph(backend):
    x, target, weights, biases = make_case_with_target([3, 6, 2], [5], "some", torch.float64)
    plain = named(loss_and_grads(x, target, weights, biases))
    leaves = [t.requires_grad_() for t in [x, target, *weights, biases[0]]]
    inner = [w * 1 for w in weights]  # no leaves
    for given in (weights, inner):
        result = named(loss_and_grads(x * 1, target * 1, given, biases))
        assert result.keys() == plain.keys()
        for name, tensor in result.items():
            assert not tensor.requires_grad
            assert tensor.grad_fn is None
            assert torch.equal(tensor, plain[name])
    assert all(leaf.grad is None for leaf in leaves)


def test_leaves_its_arguments_alone(backend):
    x, target, weights, biases = make_case_with_target([3, 6, 2], [5], "all", torch.float64)
    arguments = [x, target, *weights, *biases]
    for tensor in arguments:
        tensor.requires_grad_()
        tensor.grad = torch.ones_like(tensor)
    before = [(t.detach().clone(), t._version, t.grad, t.grad.clone()) for t in arguments]
    loss_and_grads(x, target, weights, biases, output_activation="tanh")
    for tensor, (value, version, grad, grad_value) in zip(arguments, before, strict=False):
        assert torch.equal(tensor, value)
        assert tensor._version == version
        assert tensor.grad is grad
        assert torch.equal(grad, grad_value)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_grad_modes(backend, mode):
    x, target, weights, biases = make_case_with_target([3, 6, 2], [5], "all", torch.float64)
    plain = named(loss_and_grads(x, target, weights, biases))
    with mode():
        assert all(
            torch.equal(tensor, plain[name])
            for name, tensor in named(loss_and_grads(x, target, weights, biases)).items()
        )


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
def test_integer_targets(backend, dtype, kind):
    x, _, weights, biases = make_case_with_target([3, 6, 2], [5], "all", dtype)
    target = torch.randint(2 if kind is torch.bool else 100, (5, 2)).to(kind)
    result = loss_and_grads(x, target, weights, biases, loss="half_sse")
    converted = loss_and_grads(x, target.to(dtype), weights, biases, loss="half_sse")
    for name, tensor in named(result).items():
        assert torch.equal(tensor, named(converted)[name])


@pytest.mark.covering
@pytest.mark.parametrize("strange", support.LAYOUTS)
@pytest.mark.parametrize("which", ["x", "target", "weights", "biases", "all"])
@pytest.mark.parametrize(("leading", "width"), [([5], 6), ([2, 3], 6), ([64], 123)], ids=str)
def test_memory_layouts(backend, leading, width, which, strange):
    """The layout may change only the order of summation, so the bounds hold."""
    x, target, weights, biases = make_case_with_target([3, width, 2], leading, "all", torch.float32)
    bounds = expected(x, target, weights, biases, "mse", "sigmoid", backend)
    if which in ("x", "all"):
        x = strange(x)
    if which in ("target", "all"):
        target = strange(target)
    if which in ("weights", "all"):
        weights = [strange(w) for w in weights]
    if which in ("biases", "all"):
        biases = [strange(b[None])[0] for b in biases]
    result = loss_and_grads(x, target, weights, biases, loss="mse", output_activation="sigmoid")
    check(named(result), bounds)


def test_expanded_arguments(backend):
    """x, target and weights with stride 0."""
    x = torch.randn(1, 3).expand(5, 3)
    target = torch.randn(1, 1).expand(5, 2)
    weights = [torch.randn(1, 3).expand(6, 3), torch.randn(1, 1).expand(2, 6)]
    biases = [torch.randn(1).expand(6), None]
    result = loss_and_grads(x, target, weights, biases)
    check(named(result), expected(x, target, weights, biases, "sse", None, backend))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("sizes", "leading"),
    [([3, 6, 2], [0]), ([3, 2], [2, 0]), ([3, 6, 0], [5]), ([0, 6, 2], [5])],
    ids=str,
)
def test_sizes_of_zero(backend, sizes, leading, loss):
    """The mean over nothing is NaN as natively. A sum is 0, and so are its gradients."""
    x, target, weights, biases = make_case_with_target(sizes, leading, "some", torch.float64)
    if sizes[0]:
        result = loss_and_grads(x, target, weights, biases, loss=loss)
        native = by_autograd(x, target, weights, biases, loss, None)
        for name, tensor in named(native).items():
            torch.testing.assert_close(named(result)[name], tensor, rtol=0, atol=0, equal_nan=True)
    else:
        result = loss_and_grads(x, target, weights, biases, loss=loss)
        check(named(result), expected(x, target, weights, biases, loss, None, backend))


SPECIAL = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.covering
@pytest.mark.parametrize("where", ["x", "target", "weights[0]", "weights[1]", "biases[0]"])
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("activation", support.ACTIVATIONS)
def test_nan_and_infinity_pass_as_natively(backend, activation, special, where):
    # Small integers: sums are exact in any order.
    x, target, weights, biases = make_case_with_target([3, 6, 2], [5], "all", torch.float64)
    x, target = x.round(), target.round()
    weights = [(4 * w).round() for w in weights]
    biases = [(4 * b).round() for b in biases]
    tensors = {"x": x, "target": target, "weights[0]": weights[0]}
    tensors |= {"weights[1]": weights[1], "biases[0]": biases[0]}
    tensors[where].flatten()[1] = special
    result = named(loss_and_grads(x, target, weights, biases, output_activation=activation))
    native = named(by_autograd(x, target, weights, biases, "sse", activation))
    for name, tensor in native.items():
        if activation in (None, "relu"):
            torch.testing.assert_close(result[name], tensor, rtol=0, atol=0, equal_nan=True)
        else:  # the same kinds of numbers in the same places
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(result[name]), kind(tensor)), name


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sizes", [[3, 2], [3, 6, 2], [3, 6, 7, 5, 2]], ids=str)
def test_one_call(backend, sizes, loss):
    x, target, weights, biases = make_case_with_target(sizes, [2, 5], "some", torch.float32)
    with support.count_calls() as counts:
        loss_and_grads(x, target, weights, biases, loss=loss, output_activation="tanh")
    assert counts == {"forward": 0, "backward": 0, "loss_and_grads": 1, "native": 0}


def test_mean_over_more_elements_than_float16_counts(backend):
    """Sums over rows are accumulated at least in float32. The sum here is above 65504, the largest
    float16, and the mean is 1.
    """
    x = torch.ones(70000, 1, dtype=torch.float16)
    weights, biases = [torch.ones(1, 1).half()], [torch.zeros(1).half()]
    target = torch.zeros_like(x)
    result = loss_and_grads(x, target, weights, biases, loss="mse")
    native = by_autograd(x, target, weights, biases, "mse", None)
    assert torch.equal(native.loss, torch.tensor(1.0).half())
    assert torch.equal(result.loss, native.loss)
    # Each term, 2/70000, is stored as a subnormal number; 70000 are summed in
    # float32 and the sum is stored.
    info, u = torch.finfo(torch.float16), torch.finfo(torch.float32).eps / 2
    gamma = 70000 * u / (1 - 70000 * u)
    bound = 70000 * info.smallest_normal * info.eps / 2 + 2 * (gamma + info.eps)
    for grad in (result.weights[0].flatten(), result.biases[0]):
        Bounded(torch.tensor([2.0]).double(), torch.tensor([bound]).double()).check(grad, "grad")


# -- The source documents ------------------------------------------------------


def document_002():
    torch.manual_seed(42)
    target = torch.randint(10, (4, 2))
    x = torch.randint(3, (4, 3)).double()
    weights = [torch.randint(3, (3, 2)).double().T]
    return x, target, weights


def test_document_002_sigmoid(backend):
    x, target, weights = document_002()
    result = loss_and_grads(x, target, weights, loss="half_sse", output_activation="sigmoid")
    figures = [-0.1916842751, -0.1505403047, -0.5027215624]
    figures += [-0.0967040759, -0.0302279895, -0.2850716981]
    figures = torch.tensor(figures, dtype=torch.float64).view(3, 2).T
    # half a unit in the last digit, and the rounding errors
    bound = expected(x, target, weights, None, "half_sse", "sigmoid", backend)["weights[0]"].bound
    Bounded(figures, 0.5e-10 + bound).check(result.weights[0], "gradient")


def test_document_002_linear(backend):
    """X^T (Y - T), in integers and therefore exact."""
    x, target, weights = document_002()
    result = loss_and_grads(x, target, weights, loss="half_sse")
    y = x @ weights[0].T
    assert torch.equal(result.weights[0], (y - target).T @ x)
    assert torch.equal(result.loss, (y - target).square().sum() / 2)


def test_document_004(backend):
    """A line fitted by gradient descent, with the figures printed there, in float32."""
    t_c = torch.tensor([0.5, 14.0, 15.0, 28.0, 11.0, 8.0, 3.0, -4.0, 6.0, 13.0, 21.0])
    t_u = torch.tensor([35.7, 55.9, 58.2, 81.9, 56.3, 48.9, 33.9, 21.8, 48.4, 60.4, 68.4])
    x, target = 0.1 * t_u[:, None], t_c[:, None]
    weight, bias = torch.ones(1, 1), torch.zeros(1)
    losses = []
    for epoch in range(1, 5001):
        result = loss_and_grads(x, target, [weight], [bias], loss="mse")
        weight -= 1e-2 * result.weights[0]
        bias -= 1e-2 * result.biases[0]
        if epoch % 500 == 0:
            losses.append(result.loss.item())
    printed = [7.860115051269531, 3.828537940979004, 3.092191219329834, 2.957697868347168]
    printed += [2.933133840560913, 2.9286484718322754, 2.9278297424316406]
    printed += [2.9276793003082275, 2.927651882171631, 2.9276468753814697]
    # The last digits depend on the order of summation: 1e-5 is what
    # shared/seeds/README.md promises of them. The parameters have four decimals.
    assert losses == pytest.approx(printed, rel=1e-5, abs=0)
    assert [bias.item(), weight.item()] == pytest.approx([-17.3012, 5.3671], rel=0, abs=0.5e-4)


# -- Training by hand ------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", support.ACTIVATIONS)
@pytest.mark.parametrize("sizes", [[3, 2, 1], [42, 64, 16, 3]], ids=str)
def test_training_by_hand_is_training_by_autograd(backend, sizes, activation, loss):
    """The same operators under autograd give the same parameters, bit by bit: the gradient at y has
    the same roundings in both.
    """
    x, target, weights, biases = make_case_with_target(sizes, [16], "some", torch.float64)
    learned = [p.clone().requires_grad_() for p in [*weights, *biases] if p is not None]
    optimizer = torch.optim.SGD(learned, lr=2.0**-8)
    parameters = [p for p in [*weights, *biases] if p is not None]
    for step in range(20):
        result = loss_and_grads(x, target, weights, biases, loss=loss, output_activation=activation)
        grads = [g for g in [*result.weights, *result.biases] if g is not None]
        by_name = iter(learned)
        theirs = (
            [next(by_name) for _ in weights],
            [b if b is None else next(by_name) for b in biases],
        )
        optimizer.zero_grad()
        LOSSES[loss](relu_mlp(x, *theirs, output_activation=activation), target).backward()
        assert all(torch.equal(g, p.grad) for g, p in zip(grads, learned, strict=True)), step
        optimizer.step()
        for parameter, grad in zip(parameters, grads, strict=False):
            parameter -= 2.0**-8 * grad
        assert all(torch.equal(p, q) for p, q in zip(parameters, learned, strict=False)), step


@pytest.mark.parametrize(
    ("sizes", "bias"), [([3, 2, 1], "all"), ([1000, 100, 10], "none")], ids=str
)
def test_gradients_are_those_of_autograd_at_every_step(backend, sizes, bias):
    """Documents 000, 001 and 003: by hand and by native autograd, to rounding."""
    x, target, weights, biases = make_case_with_target(sizes, [64], bias, torch.float64)
    for _ in range(10):
        result = loss_and_grads(x, target, weights, biases)
        native = by_autograd(x, target, weights, biases, "sse", None)
        bounds = expected(x, target, weights, biases, "sse", None, backend)
        twice = {n: Bounded(t, 2 * bounds[n].bound) for n, t in named(native).items()}
        check(named(result), twice)
        pairs = itertools.chain(
            zip(weights, result.weights, strict=False),
            zip(biases or [], result.biases or [], strict=False),
        )
        for parameter, grad in pairs:
            parameter -= 1e-5 * grad
