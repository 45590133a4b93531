"""A mode, and a replacement of a function that the native layers call, sees what the native layers
do.

docs/compatibility.md, "Under modes", says when the operators run nevertheless.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import relu_mlp
import support
from relu_mlp import ReluMLP

R = torch.ops.relu_mlp


def integers(*shape):
    generator = torch.Generator().manual_seed(7)
    return torch.randint(-2, 3, shape, generator=generator).float()


def native_twin(activation=None, inplace=False):
    """Linear, ReLU, Linear, ReLU, Linear, and an output activation."""
    last = {"sigmoid": [nn.Sigmoid()], "tanh": [nn.Tanh()], None: []}[activation]
    relus = nn.ReLU(inplace), nn.ReLU(inplace)
    layers = [nn.Linear(3, 6), relus[0], nn.Linear(6, 5), relus[1], nn.Linear(5, 4)]
    return support.integers_(nn.Sequential(*layers, *last))


FORMS = ["module", "longer", "functional"]


def functions(mlp, module, activation):
    weights, biases = support.layers_of(module)
    return lambda x: mlp(x, weights, biases, output_activation=activation)


def forms(form, activation=None, inplace=False):
    """(ours, native) of a form: functions of x, and the parameters of each."""
    ours, native = native_twin(activation, inplace), native_twin(activation, inplace)
    if form == "functional":
        return [
            (functions(mlp, module, activation), list(module.parameters()))
            for mlp, module in ((relu_mlp.relu_mlp, ours), (support.native_mlp, native))
        ]
    if form == "longer":
        ours.append(nn.Softshrink())
        native.append(nn.Softshrink())
        ours = relu_mlp.fuse(ours)
    else:
        ours = ReluMLP.from_sequential(ours)
    return [(module, list(module.parameters())) for module in (ours, native)]


def run(function, parameters, x=None):
    x = (integers(7, 3) if x is None else x).requires_grad_()
    y = function(x)
    grads = torch.autograd.grad(y, [x, *parameters], integers(*y.shape), allow_unused=True)
    return [y.detach(), *grads]


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        assert a is None or torch.equal(a, e)


# -- Replaced functions and methods -----------------------------------------------------------


def doubled(original):
    return lambda *args, **kwargs: 2 * original(*args, **kwargs)


def doubled_linears(original):
    """Replaces a method that is called for all modules."""

    def method(self, *args, **kwargs):
        value = original(self, *args, **kwargs)
        return 2 * value if type(self) is nn.Linear else value

    return method


def negated_weight(original):
    """Replaces a method that looks up attributes."""

    def method(self, name):
        if name == "weight":
            return -original(self, "__dict__")["_parameters"]["weight"]
        return original(self, name)

    return method


def negated_by_getattr(original):
    def method(self, name):
        value = original(self, name)
        return -value if name == "weight" else value

    return method


def negated_property(name):
    return property(lambda self: -self._parameters[name])


def without_the_last(original):
    return lambda self: iter(list(original(self))[:-1])


#: Each replacement: where, its name, the new object, the output activation, and whether a network
#: of functions calls it too.
PATCHES = {
    "F.linear": (F, "linear", doubled, None, True),
    "F.relu": (F, "relu", doubled, None, True),
    "torch.relu": (torch, "relu", doubled, None, True),
    "torch.sigmoid": (torch, "sigmoid", doubled, "sigmoid", True),
    "torch.tanh": (torch, "tanh", doubled, "tanh", True),
    "torch.relu_": (torch, "relu_", doubled, None, False),
    "Linear.forward": (nn.Linear, "forward", doubled, None, False),
    "ReLU.forward": (nn.ReLU, "forward", doubled, None, False),
    "Sigmoid.forward": (nn.Sigmoid, "forward", doubled, "sigmoid", False),
    "Tanh.forward": (nn.Tanh, "forward", doubled, "tanh", False),
    "Module.__call__": (nn.Module, "__call__", doubled_linears, None, False),
    "Linear.__call__": (nn.Linear, "__call__", doubled, None, False),
    "ReLU.__call__": (nn.ReLU, "__call__", doubled, None, False),
    "Sigmoid.__call__": (nn.Sigmoid, "__call__", doubled, "sigmoid", False),
    "Module._call_impl": (nn.Module, "_call_impl", doubled_linears, None, False),
    "Linear._call_impl": (nn.Linear, "_call_impl", doubled, None, False),
    "Module.__getattr__": (nn.Module, "__getattr__", negated_by_getattr, None, False),
    "Linear.__getattribute__": (nn.Linear, "__getattribute__", negated_weight, None, False),
    "Linear.weight": (nn.Linear, "weight", lambda _: negated_property("weight"), None, False),
    "Linear.bias": (nn.Linear, "bias", lambda _: negated_property("bias"), None, False),
    "Module.bias": (nn.Module, "bias", lambda _: negated_property("bias"), None, False),
    "Sequential.forward": (nn.Sequential, "forward", doubled, None, False),
    "Sequential.__iter__": (nn.Sequential, "__iter__", without_the_last, None, False),
}


@pytest.mark.parametrize(
    ("what", "form"),
    [
        (what, form)
        for what, (*_, is_of_functions) in PATCHES.items()
        for form in FORMS
        if is_of_functions or form != "functional"
    ],
)
def test_what_is_replaced_is_called(backend, what, form, monkeypatch):
    owner, name, wrap, activation, _ = PATCHES[what]
    ours, native = forms(form, activation, inplace=what == "torch.relu_")
    before = run(*native)
    run(*ours)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, wrap(getattr(owner, name, None)), raising=False)
        with support.count_calls() as calls:
            actual = run(*ours)
        expected = run(*native)
    # Among other children, everything except the output activation may be fused, and that is
    # called.
    is_all_but_one = form == "longer" and activation is not None
    assert calls["forward"] == calls["backward"] == is_all_but_one
    if is_all_but_one:
        torch.testing.assert_close(actual, expected)
    else:
        assert_same(actual, expected)
    assert not torch.equal(expected[0], before[0])
    with support.count_calls() as calls:
        after = run(*ours)
    assert (calls["forward"], calls["backward"]) == (1, 1)
    if activation is None:
        assert_same(after, before)


@pytest.mark.parametrize("owner", [nn.Module, nn.Linear, nn.ReLU])
def test_an_additional_class_attribute_changes_nothing(backend, owner, monkeypatch):
    monkeypatch.setattr(owner, "describe", lambda self: "a helper", raising=False)
    ours, native = forms("module")
    with support.count_calls() as calls:
        actual = run(*ours)
    assert calls["forward"] == 1
    assert_same(actual, run(*native))


@pytest.mark.slow
def test_imported_while_something_is_replaced():
    """A replacement made before the import is detected like one that is made afterwards."""
    program = """
import functools, torch, torch.nn.functional as F
from torch import nn
linear, forward = F.linear, nn.ReLU.forward
F.linear = functools.wraps(linear)(lambda *args: 2 * linear(*args))
nn.ReLU.forward = functools.wraps(forward)(lambda self, x: 3 * forward(self, x))
from relu_mlp import ReluMLP, relu_mlp
net, x = ReluMLP(3, 4, 2), torch.ones(5, 3)
y = relu_mlp(x, [net[0].weight, net[2].weight])
assert torch.equal(net(x), nn.Sequential(*net)(x))
F.linear = linear
assert torch.equal(net(x), nn.Sequential(*net)(x))
assert torch.allclose(y, 4 * relu_mlp(x, [net[0].weight, net[2].weight]))
"""
    subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=Path(relu_mlp.__file__).parent.parent
    )


# -- Function modes ---------------------------------------------------------------------------


#: Reads of the size of a bias. The native functions read it without a call.
SIZES = [torch.Tensor.nbytes.__get__, torch.Tensor.numel]


class Functions(TorchFunctionMode):
    """Records every function, and computes with other weights."""

    def __init__(self):
        super().__init__()
        self.log = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.log.append((func, len(args), kwargs and sorted(kwargs)))
        if func is F.linear:
            args = (args[0], 2 * args[1], *args[2:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", FORMS)
def test_a_function_mode_sees_the_native_functions(backend, form):
    results, logs = [], []
    for function, parameters in forms(form):
        x = integers(7, 3).requires_grad_()
        with Functions() as mode:
            y = function(x)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), [x, *parameters])])
        # Reading the size of a bias is no computation.
        logs.append([entry for entry in mode.log if entry[0] not in SIZES])
    assert_same(*results)
    assert logs[0] == logs[1]
    assert any(func is F.linear for func, *_ in logs[1])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_in_a_compiled_function_too(backend, form):
    results = []
    for function, parameters in forms(form):
        torch.compiler.reset()
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        outside = run(compiled, parameters)
        with Functions():
            results.append([*outside, *run(compiled, parameters), *run(compiled, parameters)])
        results[-1] += run(compiled, parameters)
    assert_same(*results)


@pytest.mark.parametrize("form", FORMS)
def test_the_default_device_is_no_such_mode(backend, form):
    ours, native = forms(form)
    x = integers(7, 3)
    expected = run(*native)
    torch.set_default_device("cpu")
    try:
        with torch.device("meta"), support.count_calls() as calls:
            y = ours[0](x)
    finally:
        torch.set_default_device(None)
    assert calls["forward"] == 1
    assert torch.equal(y, expected[0])


# -- Dispatch modes ---------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Records the operators."""

    def __init__(self):
        super().__init__()
        self.log = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.log.append(func)
        return func(*args, **(kwargs or {}))


class Understanding(Operators):
    understands_relu_mlp = True


def is_ours(operator):
    return operator.namespace == "relu_mlp"


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("form", FORMS)
def test_a_dispatch_mode_sees_the_native_operators(backend, form, grad):
    logs = []
    for function, parameters in forms(form):
        with Operators() as mode, torch.set_grad_enabled(grad):
            if grad:
                run(function, parameters)
            else:
                function(integers(7, 3))
        logs.append(mode.log)
    assert logs[0] == logs[1]
    assert torch.ops.aten.addmm.default in logs[0]


class Zeroed(TorchDispatchMode):
    """Simulates a matrix product of another kind."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is torch.ops.aten.addmm.default else result


@pytest.mark.parametrize("form", FORMS)
def test_a_dispatch_mode_may_compute_otherwise(backend, form):
    results = []
    for function, parameters in forms(form):
        with Zeroed():
            results.append(run(function, parameters))
    assert_same(*results)


@pytest.mark.parametrize("form", FORMS)
def test_a_mode_that_understands_the_operators_sees_them(form):
    if "extension" not in support.BACKENDS:
        pytest.skip("the reference has no operators")
    ours, _ = forms(form)
    with Understanding() as mode:
        run(*ours)
    assert list(filter(is_ours, mode.log)) == [R.forward.default, R.backward.default]
    with Operators() as mode:
        mode.understands_relu_mlp = True  # an object may declare it for itself
        run(*ours)
    assert len(list(filter(is_ours, mode.log))) == 2
    # All modes have to understand the operators, in any order.
    for outer, inner in ((Understanding(), Operators()), (Operators(), Understanding())):
        with outer, inner:
            run(*ours)
        assert not any(map(is_ours, outer.log + inner.log))


@pytest.mark.parametrize("form", FORMS)
def test_a_mode_of_the_backward_pass_alone(form):
    """It sees the rest of what the forward pass started: one operator, or the native ones."""
    if "extension" not in support.BACKENDS:
        pytest.skip("the reference has no operators")
    ours, native = forms(form)
    x = integers(7, 3).requires_grad_()
    expected = run(*native)
    function, parameters = ours
    y = function(x)
    with Operators() as mode:
        grads = torch.autograd.grad(y, [x, *parameters], integers(*y.shape))
    assert list(filter(is_ours, mode.log)) == [R.backward.default]
    assert torch.ops.aten.mm.default not in mode.log
    assert_same(grads, expected[1:])
    with Operators():
        y = function(x)
    with Operators() as mode:
        grads = torch.autograd.grad(y, [x, *parameters], integers(*y.shape))
    assert not any(map(is_ours, mode.log))
    assert torch.ops.aten.mm.default in mode.log
    assert_same(grads, expected[1:])


def test_recorded_graphs_hold_the_operator():
    if "extension" not in support.BACKENDS:
        pytest.skip("the reference has no operators")
    for form in FORMS:
        ours, _ = forms(form)
        with torch.no_grad():
            graph = make_fx(ours[0])(integers(7, 3)).graph
        assert R.relu_mlp.default in [node.target for node in graph.nodes]


def test_the_counter_of_operations_knows_the_operators():
    if "extension" not in support.BACKENDS:
        pytest.skip("the reference has no operators")
    totals = []
    for function, parameters in forms("functional"):
        with FlopCounterMode(display=False) as counter:
            run(function, parameters)
        totals.append(counter.get_total_flops())
        seen = {str(name) for counts in counter.get_flop_counts().values() for name in counts}
        assert ("relu_mlp.forward" in seen) == (len(totals) == 1)
    assert totals[0] == totals[1] > 0


# -- Selective checkpoints, whose policy is asked in a mode ------------------------------------


def save_products(context, operator, *args, **kwargs):
    is_saved = operator in (torch.ops.aten.addmm.default, R.forward.default)
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE


def modes_of_a_checkpoint(understand):
    modes = create_selective_checkpoint_contexts(save_products)
    for mode in modes:
        mode.understands_relu_mlp = understand
    return modes


@pytest.mark.parametrize("understand", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_selective_checkpoints(backend, form, understand):
    """A policy gets ATen's operators, or the package's if its modes are marked as understanding
    them.
    """
    results = []
    for function, parameters in forms(form):
        results.append(
            run(
                lambda x, function=function: checkpoint(
                    function,
                    x,
                    use_reentrant=False,
                    context_fn=lambda: modes_of_a_checkpoint(understand),
                ),
                parameters,
            )
        )
    assert_same(*results)
    ours, _ = forms(form)
    seen = []

    def policy(context, operator, *args, **kwargs):
        seen.append(operator)
        return save_products(context, operator)

    def contexts():
        modes = create_selective_checkpoint_contexts(policy)
        for mode in modes:
            mode.understands_relu_mlp = understand
        return modes

    run(lambda x: checkpoint(ours[0], x, use_reentrant=False, context_fn=contexts), ours[1])
    assert any(map(is_ours, seen)) == (understand and backend == "extension")
    assert (torch.ops.aten.addmm.default in seen) == (not understand)
