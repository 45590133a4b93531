"""Bad input raises what PyTorch raises, or ValueError where PyTorch has no such argument. The
message names the argument, what was expected and what was given. Nothing is left half-changed.
"""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import relu_mlp
import support
from relu_mlp import ReluMLP, loss_and_grads
from support.bad_arguments import (
    B0,
    B1,
    CLASSES,
    NETWORKS,
    NO_ACTIVATIONS,
    NO_LOSSES,
    TARGETS,
    W0,
    W1,
    T,
    X,
    assert_unchanged,
    raised,
    snapshot,
    under_every_backend,
)


@pytest.mark.parametrize("bad", NETWORKS.values(), ids=list(NETWORKS))
@pytest.mark.parametrize("requires_grad", [False, True])
def test_relu_mlp(bad, requires_grad):
    x = bad.x
    if requires_grad and isinstance(x, torch.Tensor) and x.is_floating_point():
        x = x.clone().requires_grad_()
    under_every_backend(
        lambda: relu_mlp.relu_mlp(x, bad.weights, bad.biases), bad.expected_error(), bad.words
    )


@pytest.mark.parametrize("bad", NETWORKS.values(), ids=list(NETWORKS))
def test_loss_and_grads(bad):
    under_every_backend(
        lambda: loss_and_grads(bad.x, T, bad.weights, bad.biases),
        bad.expected_error(),
        bad.words,
    )


@pytest.mark.parametrize(("target", "error", "words"), TARGETS.values(), ids=list(TARGETS))
@pytest.mark.parametrize("loss", ["sse", "mse", "l1", "huber", "bce_with_logits"])
def test_target(target, error, words, loss):
    call = lambda: loss_and_grads(X, target, [W0, W1], [B0, B1], loss=loss)  # noqa: E731
    under_every_backend(call, error, words)


@pytest.mark.parametrize(("target", "error", "words"), CLASSES.values(), ids=list(CLASSES))
def test_target_of_cross_entropy(target, error, words):
    call = lambda: loss_and_grads(X, target, [W0, W1], [B0, B1], loss="cross_entropy")  # noqa: E731
    under_every_backend(call, error, words)


@pytest.mark.parametrize("target", [torch.ones(2, 5).long(), torch.ones(2, 2, 5)], ids=["c", "p"])
def test_cross_entropy_of_a_batch_of_batches(target):
    """PyTorch would take dimension 1 for the classes."""
    x = torch.ones(2, 5, 3)
    words = ["x", "(rows, in_features)", "(2, 5, 3)", "flatten"]
    call = lambda: loss_and_grads(x, target, [W0, W1], loss="cross_entropy")  # noqa: E731
    under_every_backend(call, RuntimeError, words)


@pytest.mark.parametrize("loss", NO_LOSSES, ids=repr)
def test_unknown_loss(loss):
    words = ["loss", "'sse'", "'half_sse'", "'mse'", "'cross_entropy'", repr(loss)]
    under_every_backend(lambda: loss_and_grads(X, T, [W0, W1], loss=loss), ValueError, words)


@pytest.mark.parametrize("activation", NO_ACTIVATIONS, ids=repr)
def test_unknown_activation(activation):
    words = ["output_activation", "None", "'relu'", "'sigmoid'", "'tanh'", repr(activation)]
    for call in (
        lambda: relu_mlp.relu_mlp(X, [W0, W1], output_activation=activation),
        lambda: loss_and_grads(X, T, [W0, W1], output_activation=activation),
        lambda: ReluMLP(3, 4, 2, output_activation=activation),
    ):
        under_every_backend(call, ValueError, words)


# -- The layer -----------------------------------------------------------------

BAD_INPUTS = {  # the words that the message must contain: of the argument, and of what was given
    "rank 0": (torch.tensor(1.0), ["x", "()"]),
    "too wide": (torch.ones(5, 4), ["x", "4", "(4, 3)"]),
    "float64": (X.double(), ["x", "float64", "float32"]),
    "float16": (X.half(), ["x", "float16", "float32"]),
    "integer": (X.long(), ["x", "int64", "float32"]),
    "complex": (X.cfloat(), ["x", "complex64", "float32"]),
    # here PyTorch's own layers raise, and their message has all of it
    "a list": ([[1.0, 2.0, 3.0]], ["input", "Tensor", "list"]),
    "None": (None, ["input", "Tensor", "NoneType"]),
    "an array": (X.numpy(), ["input", "Tensor", "ndarray"]),
}


def set_parameter(position, name, value):
    def change(net):
        setattr(net[position], name, nn.Parameter(value))

    return change


BAD_PARAMETERS = {
    "no chain": (set_parameter(2, "weight", torch.ones(2, 5)), ["weights[1]", "(2, 5)"]),
    "weight of rank 1": (set_parameter(0, "weight", torch.ones(3)), ["weights[0]", "(3,)"]),
    "bias too long": (set_parameter(0, "bias", torch.ones(5)), ["biases[0]", "(4,)", "(5,)"]),
    "bias without elements": (
        set_parameter(0, "bias", torch.ones(0)),
        ["biases[0]", "(4,)", "(0,)"],
    ),
    "another dtype": (lambda net: net[2].double(), ["weights[1]", "float32", "float64"]),
    "bias of another dtype": (
        set_parameter(2, "bias", torch.ones(2).double()),
        ["biases[1]", "float32", "float64"],
    ),
    "bias elsewhere": (
        set_parameter(0, "bias", torch.ones(4, device="meta")),
        ["biases[0]", "cpu", "meta"],
    ),
}


@pytest.mark.parametrize(("x", "words"), BAD_INPUTS.values(), ids=list(BAD_INPUTS))
def test_layer_with_bad_input(x, words):
    net, native = support.twins(3, 4, 2)
    with pytest.raises(Exception) as caught:
        native(x)
    under_every_backend(lambda: net(x), caught.type, words)


@pytest.mark.parametrize(("change", "words"), BAD_PARAMETERS.values(), ids=list(BAD_PARAMETERS))
def test_layer_with_bad_parameters(change, words):
    net, native = support.twins(3, 4, 2)
    change(net)
    change(native)
    with pytest.raises(Exception) as caught:
        native(X)
    under_every_backend(lambda: net(X), caught.type, words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("3", 4, 2), ["in_features", "int", "str"]),
        ((3.0, 4, 2), ["in_features", "int", "float"]),
        ((None, 4, 2), ["in_features", "int", "NoneType"]),
        ((3, 4, "2"), ["out_features", "int", "str"]),
        ((3, 4, 2.0), ["out_features", "int", "float"]),
        ((3, 4, None), ["out_features", "int", "NoneType"]),
        ((-1, 4, 2), ["in_features", "-1"]),
        ((3, 4, -2), ["out_features", "-2"]),
        ((-1, (), 2), ["in_features", "-1"]),
    ],
    ids=str,
)
def test_sizes_of_the_layer_as_in_linear(arguments, words):
    with pytest.raises(Exception) as caught:
        nn.Linear(arguments[0], arguments[2])
    raised(lambda: ReluMLP(*arguments), caught.type, words)


@pytest.mark.parametrize(
    ("hidden", "error", "words"),
    [
        (0, ValueError, ["hidden_features", "at least 1", "0"]),
        (-4, ValueError, ["hidden_features", "at least 1", "-4"]),
        ([4, 0], ValueError, ["hidden_features[1]", "at least 1", "got 0"]),
        ((4, -1, 4), ValueError, ["hidden_features[1]", "at least 1", "got -1"]),
        (4.0, TypeError, ["hidden_features", "int", "float"]),
        (None, TypeError, ["hidden_features", "int", "NoneType"]),
        ("4", TypeError, ["hidden_features", "int", "str"]),
        ([4, "5"], TypeError, ["hidden_features[1]", "int", "str"]),
        ([4, None], TypeError, ["hidden_features[1]", "int", "NoneType"]),
        ([[4]], TypeError, ["hidden_features[0]", "int", "list"]),
    ],
    ids=str,
)
def test_hidden_widths(hidden, error, words):
    raised(lambda: ReluMLP(3, hidden, 2), error, words)


@pytest.mark.parametrize(
    ("sequential", "error", "words"),
    [
        (3, TypeError, ["sequential", "nn.Sequential", "int"]),
        (nn.Linear(3, 4), TypeError, ["sequential", "nn.Sequential", "Linear"]),
        (nn.Sequential(), ValueError, ["sequential", "Linear", "none"]),
        (nn.Sequential(nn.ReLU()), ValueError, ["sequential", "Linear", "ReLU at 0"]),
        (
            nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)),
            ValueError,
            ["sequential", "Linear at 1"],
        ),
        (
            nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)),
            ValueError,
            ["sequential", "GELU at 1"],
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_from_sequential(sequential, error, words):
    raised(lambda: ReluMLP.from_sequential(sequential), error, words)


def test_fuse_and_backend():
    raised(lambda: relu_mlp.fuse([nn.Linear(3, 4)]), TypeError, ["model", "nn.Module", "list"])
    for name in ("cuda", "", None, 3, []):
        words = ["'auto'", "'extension'", "'reference'", repr(name)]
        raised(lambda: relu_mlp.backend(name), ValueError, words)  # noqa: B023


# -- Nothing is left half-changed ------------------------------------------------


@pytest.mark.parametrize("bad", NETWORKS.values(), ids=list(NETWORKS))
def test_functions_change_nothing_when_they_raise(backend, bad):
    x, weights, biases = X.clone(), [W0.clone(), W1.clone()], [B0.clone(), B1.clone()]
    leaves = [x, *weights, *biases]
    for leaf in leaves:
        leaf.requires_grad_().grad = torch.ones_like(leaf)

    def ours(value):
        """The good arguments of a bad call, as these tensors."""
        if isinstance(value, list):
            return [ours(item) for item in value]
        known = zip([X, W0, W1, B0, B1], leaves, strict=False)
        return next((leaf for constant, leaf in known if value is constant), value)

    first = relu_mlp.relu_mlp(x, weights, biases).detach()
    gradients = loss_and_grads(x, T, weights, biases)
    before = snapshot(leaves)
    error = bad.expected_error()
    arguments = ours(bad.weights), ours(bad.biases)
    for _ in range(2):
        with pytest.raises(error):
            relu_mlp.relu_mlp(ours(bad.x), *arguments)
        with pytest.raises(error):
            loss_and_grads(ours(bad.x), T, *arguments)
        assert_unchanged(before)
    assert torch.is_grad_enabled()
    assert relu_mlp.build_info().backend == backend
    assert torch.equal(relu_mlp.relu_mlp(x, weights, biases), first)
    again = loss_and_grads(x, T, weights, biases)
    assert torch.equal(again.loss, gradients.loss)
    assert all(map(torch.equal, again.weights, gradients.weights))


@pytest.mark.parametrize("x", [x for x, _ in BAD_INPUTS.values()], ids=list(BAD_INPUTS))
def test_layer_changes_nothing_when_it_raises(backend, x):
    net, _ = support.twins(3, 4, 2)
    first = net(X)
    first.sum().backward()
    before = snapshot(net.parameters())
    state = OrderedDict((name, child) for name, child in net._modules.items())
    for _ in range(2):
        with pytest.raises((RuntimeError, TypeError)):
            net(x)
    assert_unchanged(before)
    assert net._modules == state
    assert torch.equal(net(X), first)


def test_a_layer_that_cannot_be_made_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    for arguments in [("3", 4, 2), (3, [4, 0], 2), (3, 4, None), (3, 4, 2, True, "gelu")]:
        with pytest.raises((TypeError, ValueError)):
            ReluMLP(*arguments)
    assert torch.equal(torch.rand(1), expected)


def test_from_sequential_that_raises_leaves_the_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    children, state = list(model), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="GELU at 1"):
        ReluMLP.from_sequential(model)
    assert type(model) is nn.Sequential
    assert list(model) == children
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_wrong_gradient_at_the_output(backend):
    """PyTorch itself raises, and the right gradient still works afterwards."""
    x = X.clone().requires_grad_()
    y = relu_mlp.relu_mlp(x, [W0, W1])
    for grad in (torch.ones(5, 3), torch.ones(5, 2, device="meta")):
        with pytest.raises(RuntimeError):
            y.backward(grad)
        assert x.grad is None
    y.backward(torch.ones(5, 2))
    assert torch.equal(x.grad, torch.ones(5, 2) @ W1 @ W0)
