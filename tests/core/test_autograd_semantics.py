"""The single autograd node behaves like the many nodes of the native path: which gradients are
computed, what is saved, where an in-place change raises, hooks, accumulation.

The networks have small integers, so both paths must give the same bits.
"""

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import support
from relu_mlp import ReluMLP, relu_mlp
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
    patterns,
)
from support.covering import covering

SIZES = [3, 4, 5, 2]
ROWS = 4  # a power of 2, so that a mean is exact
LAYERS = len(SIZES) - 1
NAMES = ["x", *(f"{kind}[{n}]" for kind in ("weights", "biases") for n in range(LAYERS))]
RECOMPUTE = pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
ACTIVATION = pytest.mark.parametrize("activation", support.ACTIVATIONS, ids=str)
THAT_SAVES_Y = pytest.mark.parametrize("activation", support.THAT_SAVE_Y, ids=str)


def network(needs=None, bias="all", sizes=SIZES, rows=ROWS):
    """x, weights and biases. `needs` says which of them require a gradient, in the order of NAMES.

    Every call returns the same tensors.
    """
    torch.manual_seed(0)
    weights, biases = integer_network(sizes, bias)
    x = integers(rows, sizes[0]).requires_grad_()
    for tensor, need in zip(leaves(x, weights, biases).values(), needs or ()):
        tensor.requires_grad_(need)
    return x, weights, biases


def assert_like_native(function, *args, **settings):
    """`function(mlp, ...)` gives the same results for the fused network and for the native one."""
    expected = function(native_mlp, *args)
    assert_same(function(relu_mlp, *args, **settings), expected)
    return expected


class CountProducts(TorchDispatchMode):
    """Counts matrix products and sums."""

    understands_relu_mlp = True

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # below autograd, a matrix product is dispatched as `matmul`
        self.count += func._schema.name in ("aten::mm", "aten::matmul", "aten::sum")
        return func(*args, **(kwargs or {}))


# -- Which gradients --------------------------------------------------------------


@RECOMPUTE
@ACTIVATION
def test_every_pattern_of_needs(backend, activation, recompute):
    """Compares with the native gradients. No gradient of a frozen tensor is computed."""
    for needs in patterns(len(NAMES)):
        x, weights, biases = network(needs)
        named = leaves(x, weights, biases)
        y = relu_mlp(x, weights, biases, output_activation=activation, recompute=recompute)
        assert y.requires_grad == any(needs)
        if not any(needs):
            assert y.grad_fn is None
            continue
        with support.backward_passes() as passes, CountProducts() as products:
            under_a_mode = gradients(y, named, retain_graph=True)
        assert passes[-1:] == [("".join("01"[need] for need in needs), sum(needs))]
        assert len(passes) == (2 if recompute and backend == "reference" else 1)
        actual = gradients(y, named)
        assert_same(actual, under_a_mode, f"needs {needs}")

        native_y = native_mlp(x, weights, biases, output_activation=activation)
        with CountProducts() as native_products:
            expected = gradients(native_y, named)
        if not recompute:  # the extension's products are its own, so the mode sees none of them
            assert products.count == (native_products.count if backend == "reference" else 0)
        if activation in (None, "relu"):
            assert_same(actual, expected, f"needs {needs}")
        else:
            bounds = first_order_bounds(x, weights, biases, activation)
            assert_within(actual, expected, bounds, f"needs {needs}")


@RECOMPUTE
def test_tensors_that_require_no_gradient_get_none(backend, recompute):
    x, weights, biases = network([True, False, True, False, True, False, True])
    relu_mlp(x, weights, biases, recompute=recompute).sum().backward()
    for tensor in leaves(x, weights, biases).values():
        assert (tensor.grad is not None) == tensor.requires_grad


def test_no_grad_and_inference_mode(backend):
    x, weights, biases = network()
    expected = native_mlp(x, weights, biases).detach()
    with torch.no_grad():
        y = relu_mlp(x, weights, biases)
    assert not y.requires_grad and y.grad_fn is None and not y.is_inference()
    assert_same(y, expected)
    with torch.inference_mode():
        y = relu_mlp(x, weights, biases)
        assert y.is_inference() and not y.requires_grad
    assert_same(y, expected)
    with torch.no_grad(), torch.enable_grad():
        assert relu_mlp(x, weights, biases).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_inference_tensors(backend, name):
    """An inference tensor that the backward pass needs can't be saved. The same ones raise
    natively.
    """

    def run(mlp, needs):
        x, weights, biases = network(needs)
        with torch.inference_mode():
            tensor = leaves(x, weights, biases)[name].detach().clone()
        if name == "x":
            x = tensor
        else:
            kind, n = name.rstrip("]").split("[")
            {"weights": weights, "biases": biases}[kind][int(n)] = tensor
        return gradients(mlp(x, weights, biases), leaves(x, weights, biases))

    position = NAMES.index(name)
    for needs in patterns(len(NAMES)):
        if any(needs) and not needs[position]:
            expected, actual = (
                outcome(run, mlp, needs, match="Inference tensors cannot be saved")
                for mlp in (native_mlp, relu_mlp)
            )
            assert_same(actual, expected, f"needs {needs}")


# -- What is saved ----------------------------------------------------------------


def saved_by(mlp, x, weights, biases, **settings):
    """The names of the tensors that a forward pass saves, and y.

    A hidden activation is identified by its values, because no function returns it.
    """
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = mlp(x, weights, biases, **settings)
    names = {tensor.data_ptr(): name for name, tensor in leaves(x, weights, biases).items()}
    names[y.data_ptr()] = "y"
    a = x.detach()
    hidden = []
    for weight, bias in zip(weights[:-1], biases[:-1]):
        a = native_mlp(a, [weight], [bias]).detach().relu()
        hidden.append(a)

    def name_of(tensor):
        if tensor.data_ptr() in names:
            return names[tensor.data_ptr()]
        (layer,) = [n for n, a in enumerate(hidden) if a.shape == tensor.shape and a.equal(tensor)]
        return f"hidden[{layer}]"

    return [name_of(tensor) for tensor in saved], y


@THAT_SAVES_Y
def test_saved_where_all_need_gradients(backend, activation):
    x, weights, biases = network()
    saved, _ = saved_by(relu_mlp, x, weights, biases, output_activation=activation)
    expected = ["x", "weights[0]", "weights[1]", "weights[2]", "hidden[0]", "hidden[1]"]
    assert sorted(saved) == sorted(expected + ["y"] * (activation is not None))


@THAT_SAVES_Y
def test_saved_is_what_the_native_path_saves(backend, activation):
    """The same tensors for every pattern of needs, each saved once."""
    for needs in patterns(len(NAMES)):
        tensors = network(needs)
        saved, _ = saved_by(relu_mlp, *tensors, output_activation=activation)
        expected, _ = saved_by(native_mlp, *tensors, output_activation=activation)
        assert sorted(saved) == sorted(set(expected)), f"needs {needs}"


@ACTIVATION
def test_recompute_saves_the_inputs_alone(backend, activation):
    settings = {"output_activation": activation, "recompute": True}
    for needs in patterns(len(NAMES)):
        saved, _ = saved_by(relu_mlp, *network(needs), **settings)
        assert sorted(saved) == (sorted(NAMES) if any(needs) else []), f"needs {needs}"


# -- Changes in place -------------------------------------------------------------

ALL_NEEDS = list(patterns(len(NAMES)))
#: Each need alone, and patterns that contain all combinations of every three needs. The saved
#: tensors decide what raises, and the test of saved tensors above covers all patterns.
SOME_NEEDS = [needs for needs in ALL_NEEDS if sum(needs) == 1]
SOME_NEEDS += [ALL_NEEDS[n] for n in covering(ALL_NEEDS, 3) if sum(ALL_NEEDS[n]) > 1]

outcome_of_a_change = partial(outcome, match="modified by an inplace operation")


def after_a_change(mlp, needs, name, activation, **settings):
    """The gradients after a change in place between forward and backward."""
    x, weights, biases = network(needs)
    named = leaves(x, weights, biases)
    y = mlp(x, weights, biases, output_activation=activation, **settings)
    with torch.no_grad():
        {"y": y, **named}[name].add_(1)
    return gradients(y, named)


@pytest.mark.parametrize("name", [*NAMES, "y"])
@THAT_SAVES_Y
def test_change_in_place_raises_where_it_does_natively(backend, activation, name):
    raised = []
    for needs in SOME_NEEDS:
        arguments = needs, name, activation
        actual = outcome_of_a_change(after_a_change, relu_mlp, *arguments)
        expected = outcome_of_a_change(after_a_change, native_mlp, *arguments)
        assert (actual is RuntimeError) == (expected is RuntimeError), f"needs {needs}"
        raised.append(actual is RuntimeError)
        if activation in (None, "relu") and expected is not RuntimeError:
            assert_same(actual, expected, f"needs {needs}")
    # A bias is never saved. A weight or x is saved sometimes, y if phi' is computed from it.
    everywhere, nowhere = name == "y" and activation, "biases" in name or name == "y"
    assert all(raised) if everywhere else not any(raised) if nowhere else len(set(raised)) == 2


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 2, 3)], ids=str)
@THAT_SAVES_Y
def test_recorded_change_of_y(backend, activation, shape):
    """y.mul_(2) with gradients enabled is recorded in the graph, or raises."""

    def run(mlp):
        _, weights, biases = network()
        x = integers(*shape).requires_grad_()
        y = mlp(x, weights, biases, output_activation=activation)
        y.mul_(2)
        return gradients(y, leaves(x, weights, biases))

    expected = outcome_of_a_change(run, native_mlp)
    assert_same(outcome_of_a_change(run, relu_mlp), expected)
    assert (expected is RuntimeError) == (activation is not None)


@pytest.mark.parametrize("name", [*NAMES, "y"])
@THAT_SAVES_Y
def test_change_in_place_with_recompute(backend, activation, name):
    """Every tensor that is used again must be unchanged. y is computed again."""
    for needs in patterns(len(NAMES)):
        if sum(needs) in (1, len(NAMES)):
            result = outcome_of_a_change(
                partial(after_a_change, relu_mlp, needs, name, activation, recompute=True)
            )
            assert (result is RuntimeError) == (name != "y"), f"needs {needs}"


def test_optimizer_step_between_two_backwards(backend):
    """The most common mistake: an optimizer step, then a second backward pass of the old graph."""

    def run(mlp):
        x, weights, biases = network()
        loss = mlp(x, weights, biases).sum()
        loss.backward(retain_graph=True)
        torch.optim.SGD([*weights, *biases], lr=1).step()
        loss.backward()

    assert outcome_of_a_change(run, native_mlp) is RuntimeError
    assert outcome_of_a_change(run, relu_mlp) is RuntimeError


# -- Several backward passes ------------------------------------------------------


@RECOMPUTE
@ACTIVATION
def test_two_backwards(backend, activation, recompute):
    x, weights, biases = network()
    named = leaves(x, weights, biases)
    y = relu_mlp(x, weights, biases, output_activation=activation, recompute=recompute)
    first = dict(zip(named, torch.autograd.grad(y.sum(), named.values(), retain_graph=True)))
    assert_same(gradients(y, named), first)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(y, named)


@RECOMPUTE
def test_gradients_accumulate(backend, recompute):
    def run(mlp, **settings):
        x, weights, biases = network()
        for _ in range(2):
            mlp(x, weights, biases, **settings).sum().backward()
        return {name: tensor.grad for name, tensor in leaves(x, weights, biases).items()}

    accumulated = assert_like_native(run, recompute=recompute)
    x, weights, biases = network()
    once = gradients(native_mlp(x, weights, biases), leaves(x, weights, biases))
    assert_same(accumulated, {name: 2 * grad for name, grad in once.items()})


def test_gradients_are_not_shared(backend):
    """An in-place change of one gradient changes no other gradient, nor grad_output."""
    x, weights, biases = network(sizes=[1, 1], rows=1)
    y = relu_mlp(x, weights, biases)
    grad_output = torch.ones_like(y)
    grads = gradients(y, leaves(x, weights, biases), grad_output)
    pointers = {grad.untyped_storage().data_ptr() for grad in [grad_output, *grads.values()]}
    assert len(pointers) == 4


# -- The gradient that arrives ----------------------------------------------------

INCOMING = {
    "sum": lambda y: y.sum(),
    "mean": lambda y: y.mean(),
    "mean over rows": lambda y: y.mean(0).sum(),
    "one element": lambda y: y[1, 1],
    "transposed": lambda y: (y.T * torch.arange(y.numel()).reshape(y.T.shape)).sum(),
    "every other row": lambda y: y[::2].sum() + y[1::2, 0].sum(),
    "flipped": lambda y: (y.flip(0) * torch.arange(y.numel()).reshape(y.shape)).sum(),
    "used twice": lambda y: (y * y).sum() + y.sum(),
}


@pytest.mark.covering
@RECOMPUTE
@pytest.mark.parametrize("activation", [None, "relu"], ids=str)
@pytest.mark.parametrize("loss", INCOMING)
def test_losses(backend, loss, activation, recompute):
    def run(mlp, **settings):
        x, weights, biases = network()
        y = mlp(x, weights, biases, output_activation=activation, **settings)
        INCOMING[loss](y).backward()
        return {name: tensor.grad for name, tensor in leaves(x, weights, biases).items()}

    assert_like_native(run, recompute=recompute)


GRAD_OUTPUTS = {
    "stride 0": lambda g: g[:1, :1].expand_as(g),
    "stride 0 over rows": lambda g: g[:1].expand_as(g),
    "stride 0 over columns": lambda g: g[:, :1].expand_as(g),
    "transposed": lambda g: g.T.contiguous().T,
    "every other": lambda g: g.repeat_interleave(2, 1)[:, ::2],
    "offset": lambda g: torch.cat([g, g])[1 : 1 + len(g)],
    "negative bit": lambda g: torch.complex(g, -g).conj().imag,
}


@pytest.mark.parametrize("activation", support.ACTIVATIONS, ids=str)
@pytest.mark.parametrize("kind", GRAD_OUTPUTS)
def test_layout_of_grad_output(backend, kind, activation):
    """The same bits as with a contiguous grad_output of the same values, where sums are exact."""
    x, weights, biases = network()
    named = leaves(x, weights, biases)
    grad_output = GRAD_OUTPUTS[kind](integers(ROWS, SIZES[-1]))
    assert kind == "offset" or not grad_output.is_contiguous() or grad_output.is_neg()
    results = [
        gradients(mlp(x, weights, biases, output_activation=activation), named, grad)
        for mlp, grad in [(relu_mlp, grad_output), (native_mlp, grad_output.clone())]
    ]
    if activation in (None, "relu"):
        assert_same(*results)
    else:
        assert_within(*results, first_order_bounds(x, weights, biases, activation, grad_output))


def test_no_gradient_arrives(backend):
    """y is part of the graph, but no gradient reaches it."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.sum()

        @staticmethod
        def backward(ctx, grad):
            return None

    def run(mlp):
        x, weights, biases = network()
        Nothing.apply(mlp(x, weights, biases)).backward()
        return {name: tensor.grad for name, tensor in leaves(x, weights, biases).items()}

    assert_like_native(run)


# -- Hooks ------------------------------------------------------------------------


@RECOMPUTE
def test_hooks(backend, recompute):
    def run(mlp, **settings):
        x, weights, biases = network()
        named = leaves(x, weights, biases)
        seen = {}
        for name in ("x", "weights[1]", "biases[2]"):
            named[name].register_hook(lambda grad: 3 * grad)
            named[name].register_post_accumulate_grad_hook(
                lambda tensor, name=name: seen.update({name: tensor.grad.clone()})
            )
        y = mlp(x, weights, biases, **settings)
        y.retain_grad()
        y.register_hook(lambda grad: 2 * grad)
        y.sum().backward()
        grads = {name: tensor.grad for name, tensor in named.items()}
        return {"y": y.grad, "seen": seen, **grads}

    result = assert_like_native(run, recompute=recompute)
    assert set(result["seen"]) == {"x", "weights[1]", "biases[2]"}


@RECOMPUTE
def test_hooks_of_the_node(backend, recompute):
    """A hook before the node changes what reaches it, a hook after it what leaves it."""
    x, weights, biases = network()
    named = leaves(x, weights, biases)

    def grads(*hooks):
        y = relu_mlp(x, weights, biases, recompute=recompute)
        handles = [getattr(y.grad_fn, register)(hook) for register, hook in hooks]
        handles.pop().remove()
        return gradients(y, named)

    def unused(*arguments):
        raise AssertionError("was removed")

    def before(reached):
        of_y, *of_hidden = reached
        assert of_y.shape == y.shape and not any(grad is not None for grad in of_hidden)
        return (2 * of_y, *of_hidden)

    def after(left, reached):
        assert [grad.shape for grad in left] == [tensor.shape for tensor in named.values()]
        assert torch.equal(reached[0], 2 * torch.ones_like(y))
        return (3 * left[0], *left[1:])

    y = native_mlp(x, weights, biases)
    expected = {name: 2 * grad for name, grad in gradients(y, named).items()}
    removed = ("register_hook", unused)
    hooked = grads(("register_prehook", before), ("register_hook", after), removed)
    assert_same(hooked, expected | {"x": 3 * expected["x"]})


@RECOMPUTE
def test_an_exception_in_a_hook_passes_through(backend, recompute):
    class Ours(Exception):
        pass

    def fail(*arguments):
        raise Ours

    x, weights, biases = network()
    with pytest.raises(Ours), saved_tensors_hooks(fail, lambda tensor: tensor):
        relu_mlp(x, weights, biases, recompute=recompute)
    with saved_tensors_hooks(lambda tensor: tensor, fail):
        y = relu_mlp(x, weights, biases, recompute=recompute)
    with pytest.raises(Ours):
        y.sum().backward()
    for register in ("register_hook", "register_prehook"):
        y = relu_mlp(x, weights, biases, recompute=recompute)
        getattr(y.grad_fn, register)(fail)
        with pytest.raises(Ours):
            y.sum().backward()


@RECOMPUTE
@pytest.mark.parametrize("order", [1, 2])
def test_anomaly_mode_finds_the_call(backend, order, recompute):
    """It names the node that gives NaN, and shows where its forward pass was called."""
    x, weights, biases = network()
    with torch.no_grad():
        weights[0][0, 0] = float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.autograd.detect_anomaly(check_nan=order == 1):
            y = relu_mlp(x, weights, biases, recompute=recompute)
            if order == 2:
                (by_x,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        with (
            torch.autograd.detect_anomaly(),
            pytest.raises(
                RuntimeError, match="MLPBackward' ret" if order == 1 else "GradientBackward' ret"
            ),
        ):
            (y if order == 1 else by_x).sum().backward()
    shown = str(caught[-1].message)
    assert "Traceback of forward call" in shown and Path(__file__).name in shown


def test_saved_tensors_hooks_replace_what_is_saved(backend):
    """Packed as another object, and unpacked to a copy."""
    packed = []

    def run(mlp):
        x, weights, biases = network()
        with saved_tensors_hooks(lambda t: packed.append(1) or t.numpy(force=True), torch.tensor):
            y = mlp(x, weights, biases, output_activation="relu")
        return gradients(y, leaves(x, weights, biases))

    assert_like_native(run)
    assert packed


@RECOMPUTE
@pytest.mark.parametrize("wrap", ["checkpoint", "save_on_cpu"])
def test_checkpoint_and_save_on_cpu(backend, wrap, recompute):
    """First and second order: tensors that are saved or computed again belong to the graph."""

    def run(mlp, **settings):
        x, weights, biases = network()
        if wrap == "checkpoint":
            y = checkpoint(
                lambda x: mlp(x, weights, biases, **settings).relu(), x, use_reentrant=False
            )
        else:
            with save_on_cpu():
                y = mlp(x, weights, biases, **settings).relu()
        named = leaves(x, weights, biases)
        grads = torch.autograd.grad(y.sum(), named.values(), create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        second = torch.autograd.grad(penalty, named.values(), materialize_grads=True)
        return {"first": dict(zip(named, grads)), "second": dict(zip(named, second))}

    assert_like_native(run, recompute=recompute)


# -- Tensors in several places ----------------------------------------------------


@RECOMPUTE
def test_one_tensor_in_several_places(backend, recompute):
    """Tied layers, a tied bias, an x that is also a weight, and an x that is a Parameter."""

    def run(mlp, **settings):
        torch.manual_seed(0)
        (weight, other), (bias, _) = integer_network([4, 4, 4])
        weight = torch.nn.Parameter(weight.detach())
        y = mlp(weight, [weight, other, weight], [bias, None, bias], **settings)
        return gradients(y, {"weight": weight, "other": other, "bias": bias})

    assert_like_native(run, recompute=recompute)


def test_one_network_twice_in_a_graph(backend):
    """As in a recurrent network: y is the next input."""

    def run(mlp):
        x, weights, biases = network(sizes=[3, 5, 3])
        y = mlp(mlp(x, weights, biases), weights, biases) + mlp(x, weights, biases)
        return gradients(y, leaves(x, weights, biases))

    assert_like_native(run)


# -- Second derivatives in training -----------------------------------------------


@RECOMPUTE
@pytest.mark.parametrize("bias", ["all", "none", "some"])
def test_gradient_penalty(backend, bias, recompute):
    """Three steps with a loss that contains the gradient of y with respect to x."""

    def train(mlp, **settings):
        x, weights, biases = network(bias=bias)
        parameters = leaves(x, weights, biases)
        parameters.pop("x")
        optimizer = torch.optim.SGD(parameters.values(), lr=2.0**-10)
        losses = []
        for _ in range(3):
            y = mlp(x, weights, biases, **settings)
            (by_x,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            loss = y.square().sum() + by_x.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # All values stay on a grid of 2^-4, on which all these sums are exact.
            with torch.no_grad():
                for parameter in parameters.values():
                    parameter.mul_(16).round_().div_(16).clamp_(-4, 4)
            losses.append(loss.detach())
        return {"losses": torch.stack(losses), **parameters}

    result = assert_like_native(train, recompute=recompute)
    assert result["losses"].unique().numel() == 3, "nothing was learnt"


def test_second_derivative_of_a_fused_layer(backend):
    """The same test through the module."""
    net, native = support.twins(3, [4, 5], 2, dtype=torch.float64)
    with torch.no_grad():
        for parameter, twin in zip(net.parameters(), native.parameters(), strict=True):
            parameter.copy_(integers(*parameter.shape))
            twin.copy_(parameter)
    x = integers(ROWS, 3).requires_grad_()
    results = []
    for model in (net, native):
        (by_x,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        grads = torch.autograd.grad(
            by_x.square().sum(), list(model.parameters()), materialize_grads=True
        )
        results.append(dict(zip(dict(model.named_parameters()), grads)))
    assert_same(*results)
    assert any(grad.any() for grad in results[0].values())


# -- One node, one call -----------------------------------------------------------


@RECOMPUTE
@pytest.mark.parametrize("form", ["function", "module"])
def test_one_node_and_one_call_each_way(backend, form, recompute):
    x, weights, biases = network()
    net = ReluMLP(3, [4, 5], 2, recompute=recompute, dtype=torch.float64)
    with support.count_calls() as calls:
        y = net(x) if form == "module" else relu_mlp(x, weights, biases, recompute=recompute)
        assert calls == {"forward": 1, "backward": 0, "loss_and_grads": 0, "native": 0}
        y.sum().backward()
    assert calls == {"forward": 1, "backward": 1, "loss_and_grads": 0, "native": 0}

    assert y.grad_fn.name() == "MLPBackward"
    below = [node.name() for node, _ in y.grad_fn.next_functions if node is not None]
    assert below == ["torch::autograd::AccumulateGrad"] * (1 + 2 * LAYERS)


def test_no_graph_is_one_call(backend):
    x, weights, biases = network()
    with torch.no_grad(), support.count_calls() as calls:
        relu_mlp(x, weights, biases)
    assert calls == {"forward": 1, "backward": 0, "loss_and_grads": 0, "native": 0}


@pytest.mark.slow
def test_graph_is_released(backend):
    """No reference cycle keeps y or the saved tensors alive. They are freed with the last
    reference.
    """
    import gc
    import weakref

    class Hook:
        def __call__(self, *grads):
            pass

    x, weights, biases = network()
    gc.collect()
    gc.disable()
    try:
        y = relu_mlp(x, weights, biases, output_activation="relu")
        hook = Hook()  # lives as long as the node, which may have no weak references itself
        y.grad_fn.register_hook(hook)
        node, tensor = weakref.ref(hook), weakref.ref(y)
        del hook
        y.sum().backward()
        assert node() is not None
        del y
        assert node() is None and tensor() is None
    finally:
        gc.enable()


@pytest.mark.covering
@RECOMPUTE
@pytest.mark.parametrize("activation", support.ACTIVATIONS, ids=str)
@pytest.mark.parametrize("penalized", list(patterns(5))[1:])
def test_what_a_second_derivative_reaches(backend, activation, penalized, recompute):
    """Where the native path gives zeros and not None, the fused node does too: optimizers see this.

    The single node may give zeros where the native path gives None.
    """
    reached = []
    for mlp, settings in ((native_mlp, {}), (relu_mlp, {"recompute": recompute})):
        torch.manual_seed(0)
        sizes = [(5, 3), (4, 3), (2, 4), (4,), (2,)]
        x, w1, w2, b1, b2 = [torch.randn(size, dtype=torch.float64) for size in sizes]
        inputs = [t.requires_grad_() for t in (x, w1, w2, b1, b2)]
        y = mlp(x, [w1, w2], [b1, b2], output_activation=activation, **settings)
        first = torch.autograd.grad(y.sum(), inputs, create_graph=True)
        chosen = [g for g, is_chosen in zip(first, penalized) if is_chosen and g.requires_grad]
        if not chosen:
            return  # natively, the result does not depend on anything here
        penalty = sum(g.square().sum() for g in chosen)
        reached.append(torch.autograd.grad(penalty, inputs, allow_unused=True))
    for name, native, ours in zip(["x", "w1", "w2", "b1", "b2"], *reached, strict=True):
        assert native is None or ours is not None, name
        assert (native is not None and native.any()) == (ours is not None and ours.any()), name


@pytest.mark.covering
@RECOMPUTE
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "not a leaf"])
@pytest.mark.parametrize("asked", NAMES)
def test_only_requested_gradients_are_computed(backend, asked, leaf, recompute):
    """A first derivative with create_graph, of one input, although all require gradients."""
    x, weights, biases = network()
    named = leaves(x, weights, biases)
    if not leaf:
        named = {name: tensor * 1 for name, tensor in named.items()}
    weights = [named[f"weights[{n}]"] for n in range(LAYERS)]
    biases = [named[f"biases[{n}]"] for n in range(LAYERS)]
    y = relu_mlp(named["x"], weights, biases, recompute=recompute)
    expected = native_mlp(named["x"], weights, biases)
    with support.backward_passes() as passes:
        (grad,) = torch.autograd.grad(y.sum(), named[asked], create_graph=True)
    (native,) = torch.autograd.grad(expected.sum(), named[asked])
    assert torch.equal(grad, native)
    assert passes == [("".join("01"[name == asked] for name in NAMES), 1)]
