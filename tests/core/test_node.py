"""What is the native autograd node's own: which calls it serves, and how.

That it behaves like the Functions in Python is shown by all tests that run on the backend "node".
"""

import copy
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import (
    allow_mutation_on_saved_tensors,
    disable_saved_tensors_hooks,
    saved_tensors_hooks,
)
from torch.nn.utils import prune
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import relu_mlp
import support
from core import test_children
from relu_mlp import ReluMLP, autograd, interception, ops, reference, run, second_order
from relu_mlp._torch_private import destroy

pytestmark = pytest.mark.skipif(ops.node is None, reason="is about the native node")

R = torch.ops.relu_mlp


@pytest.fixture(autouse=True)
def node():
    with support.backend("node"):
        yield


def integers(*shape, dtype=torch.float64):
    return support.integers(*shape, dtype=dtype)


def network(**settings):
    """A network of small integers, so that sums are exact."""
    return support.integers_(ReluMLP(3, [4, 5], 2, dtype=torch.float64, **settings))


# -- Which calls go through PyTorch's dispatcher ---------------------------------------------------


@pytest.fixture
def dispatched():
    """A list of the operators whose kernels run. The node's direct calls are not in it."""
    names = []

    def kernel(name):
        def function(*arguments):
            names.append(name)
            return getattr(reference, name)(*arguments)

        return function

    library = torch.library.Library("relu_mlp", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for name in ("relu_mlp", "forward", "backward", "backward_vjp", "recompute_backward"):
            library.impl(name, kernel(name), "CPU", allow_override=True)
    yield names
    destroy(library)


class Understanding(TorchDispatchMode):
    understands_relu_mlp = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def in_no_grad(function):
    with torch.no_grad():
        return function()


def in_inference_mode(function):
    with torch.inference_mode():
        return function()


#: Calls, and the operators that serve them by way of the dispatcher.
CALLS = {
    "training": (lambda net, x: net(x).sum().backward(), []),
    "no_grad": (lambda net, x: in_no_grad(lambda: net(x)), []),
    "inference_mode": (lambda net, x: in_inference_mode(lambda: net(x)), []),
    "a function": (
        lambda net, x: relu_mlp.relu_mlp(x, *support.layers_of(net)).sum().backward(),
        [],
    ),
    "a vector": (lambda net, x: net(x[0]).sum().backward(), []),
    "three dimensions": (lambda net, x: net(x.reshape(2, 2, 3)).sum().backward(), []),
    "rows apart": (lambda net, x: net(x[::2]).sum().backward(), []),
    "no rows": (lambda net, x: net(x[:0]).sum().backward(), []),
    "a transposed gradient": (lambda net, x: net(x).backward(integers(2, 4).T), []),
    "some gradients": (lambda net, x: torch.autograd.grad(net(x).sum(), net[2].weight), []),
    "a second derivative": (
        lambda net, x: (
            torch.autograd.grad(net(x).sum(), x, create_graph=True)[0].square().sum().backward()
        ),
        [],
    ),
    "an operator in no_grad": (
        lambda net, x: in_no_grad(lambda: R.relu_mlp(x, *support.layers_of(net), "none")),
        ["relu_mlp"],
    ),
    "a transposed x": (
        lambda net, x: net(x.detach().T.contiguous().T).sum().backward(),
        ["forward", "backward"],
    ),
    "columns apart": (
        lambda net, x: net(x.repeat_interleave(2, 1)[:, ::2]).sum().backward(),
        ["forward", "backward"],
    ),
    "an expanded x": (
        lambda net, x: net(x[:, :1].expand(4, 3)).sum().backward(),
        ["forward", "backward"],
    ),
    "a conjugate view": (
        lambda net, x: net(torch.complex(x, -x).conj().imag).sum().backward(),
        ["forward", "backward"],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_which_calls_go_through_the_dispatcher(name, dispatched):
    function, expected = CALLS[name]
    function(network(), integers(4, 3).requires_grad_())
    assert dispatched == expected


def test_recomputation_needs_no_dispatcher_either(dispatched):
    network(recompute=True)(integers(4, 3)).sum().backward()
    assert dispatched == []


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "active", [Understanding, partial(profile, acc_events=True)], ids=["mode", "profiler"]
)
@pytest.mark.parametrize("around", ["forward", "backward", "inference"])
def test_what_has_to_see_the_operators_sees_them(active, around, recompute, dispatched):
    net, x = network(recompute=recompute), integers(4, 3)
    if around == "inference":
        with active(), torch.no_grad():
            net(x)
        assert dispatched == ["relu_mlp"]
        return
    with active() if around == "forward" else nullcontext():
        y = net(x)
    with active() if around == "backward" else nullcontext():
        y.sum().backward()
    in_backward = "recompute_backward" if recompute else "backward"
    if around == "backward":
        assert dispatched == [in_backward]
    elif active is Understanding:  # under a mode Python records the graph
        assert dispatched == ["forward", in_backward]
    else:
        assert dispatched == ["forward"]


def test_a_compiled_graph_calls_operators_directly(dispatched):
    """`ops.cpp_graphs` gives Inductor's code these functions in place of the operators."""
    x, weights, biases = support.integer_case([3, 4, 5, 2], 4)
    functions = {
        name: ops.node.operator(name, lambda *arguments: pytest.fail("was not served"))
        for name in ("relu_mlp", "forward", "backward")
    }
    with torch.no_grad():
        y = functions["relu_mlp"](x, weights, biases, "tanh")
        also_y, hidden = functions["forward"](x, weights, biases, "tanh", True)
        grads = functions["backward"](y, [x, y, *weights, *hidden], "tanh", "1" * 7)
    expected_y, expected_hidden = reference.forward(x, weights, biases, "tanh", True)
    torch.testing.assert_close([y, also_y, hidden], [expected_y, expected_y, expected_hidden])
    saved = [x, expected_y, *weights, *expected_hidden]
    torch.testing.assert_close(grads, reference.backward(expected_y, saved, "tanh", "1" * 7))
    assert dispatched == []


# -- The same errors as without the node -----------------------------------------------------------


def outcome(function):
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


def freed(tensor, nbytes=0):
    tensor = tensor.detach().clone()
    tensor.untyped_storage().resize_(nbytes)
    return tensor


#: Changes of one tensor.
BAD = {
    "freed": freed,
    "half freed": lambda t: freed(t, t.nbytes // 2),
    "one dimension more": lambda t: t[None],
    "one dimension less": lambda t: t[0],
    "one column less": lambda t: t[..., 1:],
    "another dtype": lambda t: t.float(),
    "integers": lambda t: t.long(),
    "complex": lambda t: t + 1j,
    "another device": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "None": lambda t: None,
    "a number": lambda t: 1.0,
    "an array": lambda t: t.detach().numpy(),
    "a quantized tensor": lambda t: torch.quantize_per_tensor(t.float(), 1, 0, torch.qint8),
}


def calls_with(bad, grad):
    """Calls with a bad tensor in each place, by name."""

    def tensors():
        x, weights, biases = support.integer_case([3, 4, 5, 2], 4)
        for weight in weights:
            weight.requires_grad_(grad)
        return x, weights, biases

    def changed(place):
        x, weights, biases = tensors()
        if place == "x":
            return BAD[bad](x), weights, biases
        kind, n = {"weight": (weights, 1), "bias": (biases, 2)}[place]
        kind[n] = BAD[bad](kind[n].detach()) if grad else BAD[bad](kind[n])
        return x, weights, biases

    def module(place):
        x, weights, biases = changed(place)
        net = network()
        for n in range(3):
            net[2 * n]._parameters.update(weight=weights[n], bias=biases[n])
        return net(x)

    def raw(operator, *more):
        return lambda place: getattr(R, operator)(*changed(place), "none", *more)

    entries = {
        "function": lambda place: relu_mlp.relu_mlp(*changed(place)),
        "module": module,
        "relu_mlp": raw("relu_mlp"),
        "forward": raw("forward", True),
    }
    return {
        (name, place): lambda call=call, place=place: call(place)
        for name, call in entries.items()
        for place in ("x", "weight", "bias")
    }


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize:DeprecationWarning")
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("bad", BAD)
def test_the_same_errors(bad, grad):
    """The class and the message of each error, or the bits of the result."""
    for name, call in calls_with(bad, grad).items():
        torch.manual_seed(0)
        found = outcome(call)
        torch.manual_seed(0)
        with support.node_enabled(False):
            expected = outcome(call)
        if isinstance(expected, torch.Tensor) and not expected.is_meta:
            support.assert_same(found, expected, str(name))
            assert found.requires_grad == expected.requires_grad, name
        elif isinstance(expected, tuple) and isinstance(expected[0], type):
            assert found == expected, name
        else:
            assert type(found) is type(expected), name


#: Changes of what a backward pass gets.
BAD_BACKWARD = {
    "freed gradient": lambda y, x: y.backward(freed(y)),
    "gradient of another shape": lambda y, x: y.backward(y[:1]),
    "freed x": lambda y, x: (x.untyped_storage().resize_(0), y.sum().backward()),
    "changed x": lambda y, x: (x.add_(1), y.sum().backward()),
    "twice": lambda y, x: (y.sum().backward(), y.sum().backward()),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bad", BAD_BACKWARD)
def test_the_same_errors_of_a_backward_pass(bad, recompute):
    def call():
        x = integers(4, 3)
        return BAD_BACKWARD[bad](network(recompute=recompute)(x), x)

    found = outcome(call)
    with support.node_enabled(False):
        expected = outcome(call)
    assert found == expected and isinstance(found[0], type)


@pytest.mark.parametrize("needs", ["", "1", "11", "1" * 6, "1" * 9, "11x1111", "0" * 7])
@pytest.mark.parametrize("saved", [slice(None), slice(1), slice(0)], ids=str)
def test_the_same_errors_of_the_operator(needs, saved):
    x, weights, biases = support.integer_case([3, 4, 5, 2], 4)
    y, hidden = R.forward(x, weights, biases, "tanh", True)
    arguments = y, [x, y, *weights, *hidden][saved], "tanh", needs
    for function in (R.backward, ops.node.operator("backward", R.backward.default)):
        for mode in (torch.no_grad(), torch.enable_grad()):
            with mode:
                found = outcome(partial(function, *arguments))
                with support.node_enabled(False):
                    assert found == outcome(partial(R.backward, *arguments))


# -- The same behavior as without the node ---------------------------------------------------------


class OwnTensor(torch.Tensor):
    pass


def with_saved(unpack, pack=lambda tensor: tensor):
    """Differentiates with hooks of the saved tensors."""

    def call(net, x):
        with saved_tensors_hooks(pack, unpack):
            y = net(x)
        return torch.autograd.grad(y.sum(), x)

    return call


def with_prehook(hook):
    def call(net, x):
        y = net(x)
        y.grad_fn.register_prehook(hook)
        return torch.autograd.grad(y.sum(), x, allow_unused=True)

    return call


def with_a_change_of_x(net, x):
    with allow_mutation_on_saved_tensors():
        y = net(x)
        with torch.no_grad():
            x.add_(1)
        return torch.autograd.grad(y.sum(), [x, net[0].weight])


def differentiated_in(context):
    def call(net, x):
        loss = net(x).square().sum()
        with context():
            (by_x,) = torch.autograd.grad(loss, x)
        return by_x, by_x.is_inference()

    return call


def of_one_parameter(net, x):
    (by_x,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    by_x.sum().backward(inputs=[net[0].weight])
    return [parameter.grad for parameter in net.parameters()]


def changed_partly(net, x):
    y = net(x)
    y[0].mul_(2)
    return y, torch.autograd.grad(y.sum(), x), y.grad_fn.name()


def retained(net, x):
    y = net(x)
    y.retain_grad()
    y.sum().backward()
    return y.grad, x.grad


def with_a_new_class(net, x):
    class Own(ReluMLP):
        @property
        def recompute(self):
            raise KeyError("recompute")

    net.__class__ = Own
    return net(x)


def deterministic(net, x):
    torch.use_deterministic_algorithms(True)
    try:
        return net(x)
    finally:
        torch.use_deterministic_algorithms(False)


BEHAVIOR = {
    "a change of what was saved": with_a_change_of_x,
    "unpacked as a subclass": with_saved(lambda tensor: tensor.as_subclass(OwnTensor)),
    "unpacked with other shapes": with_saved(lambda tensor: tensor[:1]),
    "unpacked with other dtypes": with_saved(lambda tensor: tensor.float()),
    "unpacked as None": with_saved(lambda tensor: None),
    "packed as a number": with_saved(torch.tensor, pack=lambda tensor: tensor.tolist()),
    "no hooks allowed": lambda net, x: disable_saved_tensors_hooks("none")(lambda: net(x))(),
    "all gradients lost": with_prehook(lambda grads: (None,) * len(grads)),
    "a gradient lost": with_prehook(lambda grads: grads[:1]),
    "a gradient more": with_prehook(lambda grads: (grads[0], *[torch.ones(4, 5)] * 2)),
    "a sparse gradient": lambda net, x: torch.autograd.grad(
        net(x), x, torch.ones(4, 2, dtype=x.dtype).to_sparse()
    ),
    "several gradients at once": lambda net, x: torch.autograd.grad(
        net(x), x, torch.ones(3, 4, 2, dtype=x.dtype), is_grads_batched=True
    ),
    "differentiated in inference mode": differentiated_in(torch.inference_mode),
    "differentiated under autocast": differentiated_in(partial(torch.autocast, "cpu")),
    "differentiated in a dual level": differentiated_in(forward_ad.dual_level),
    "one parameter": of_one_parameter,
    "a change of a row of y": changed_partly,
    "a retained gradient": retained,
    "detached in place": lambda net, x: net(x).detach_().requires_grad,
    "gradients turned off": lambda net, x: net(x).requires_grad_(False),
    "a copy": lambda net, x: copy.deepcopy(net(x)),
    "shown": lambda net, x: repr(net(x)),
    "by keyword": lambda net, x: net(input=x),
    "a scalar": lambda net, x: net(x.sum()),
    "many dimensions": lambda net, x: net(x.reshape(2, 1, 2, 1, 3)),
    "a nested tensor": lambda net, x: net(
        torch.nested.nested_tensor([x[:1].detach(), x[1:].detach()], layout=torch.jagged)
    ).values(),
    "deterministic": deterministic,
    "an attribute that raises": with_a_new_class,
    "the metadata of the node": lambda net, x: [
        (tuple(entry.shape), entry.dtype) for entry in net(x).grad_fn._input_metadata
    ],
    "the nodes below": lambda net, x: [
        (None if node is None else node.name(), n) for node, n in net(x).grad_fn.next_functions
    ],
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # at the first tangent
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", BEHAVIOR)
def test_the_same_behavior(name, recompute):
    outcomes = []
    for flag in (True, False):
        with support.node_enabled(flag):
            net, x = network(recompute=recompute, output_activation="tanh"), integers(4, 3)
            outcomes.append(outcome(partial(BEHAVIOR[name], net, x.requires_grad_())))
    found, expected = (tree_flatten(one) for one in outcomes)
    assert found[1] == expected[1]
    for n, pair in enumerate(zip(found[0], expected[0], strict=True)):
        if isinstance(pair[1], torch.Tensor):
            support.assert_same(*pair, f"result {n}")
            assert type(pair[0]) is type(pair[1])
        else:
            assert pair[0] == pair[1]


# -- Children that were changed --------------------------------------------------------------------


@contextmanager
def replaced(owner, name, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value, raising=False)
        yield


@contextmanager
def removed_after(handle):
    try:
        yield
    finally:
        handle.remove()


def nothing(*arguments):
    pass


class OwnParameter(nn.Parameter):
    pass


class OwnLinear(nn.Linear):
    pass


#: Changes of a network or of PyTorch's classes. Each is undone if it gives a context manager.
CHANGES = {
    **test_children.CHANGES,
    "nothing": nothing,
    "a forward hook": lambda net: net[2].register_forward_hook(nothing),
    "a forward pre-hook": lambda net: net[1].register_forward_pre_hook(nothing),
    "a backward hook": lambda net: net[2].register_full_backward_hook(nothing),
    "a backward pre-hook": lambda net: net[1].register_full_backward_pre_hook(nothing),
    "a hook that is gone": lambda net: net[2].register_forward_hook(nothing).remove(),
    "a hook for states": lambda net: net[2].register_state_dict_pre_hook(nothing),
    "a plain dict of hooks": lambda net: net[2].__dict__.update(_forward_hooks={}),
    "no dict of hooks": lambda net: net[2].__dict__.pop("_forward_hooks"),
    "a global forward hook": lambda net: removed_after(
        nn.modules.module.register_module_forward_hook(nothing)
    ),
    "a global forward pre-hook": lambda net: removed_after(
        nn.modules.module.register_module_forward_pre_hook(nothing)
    ),
    "a global backward hook": lambda net: removed_after(
        nn.modules.module.register_module_full_backward_hook(nothing)
    ),
    "a global backward pre-hook": lambda net: removed_after(
        nn.modules.module.register_module_full_backward_pre_hook(nothing)
    ),
    "forward of Linear": lambda net: replaced(nn.Linear, "forward", lambda self, x: x),
    "forward of ReLU": lambda net: replaced(nn.ReLU, "forward", lambda self, x: x),
    "forward of Sequential": lambda net: replaced(nn.Sequential, "forward", lambda self, x: x),
    "__call__ of Module": lambda net: replaced(nn.Module, "__call__", lambda self, x: x),
    "__call__ of Linear": lambda net: replaced(nn.Linear, "__call__", lambda self, x: x),
    "_call_impl of ReLU": lambda net: replaced(nn.ReLU, "_call_impl", lambda self, x: x),
    "weight of Linear": lambda net: replaced(nn.Linear, "weight", property(lambda self: None)),
    "bias of Module": lambda net: replaced(nn.Module, "bias", property(lambda self: None)),
    "__getattr__ of Linear": lambda net: replaced(nn.Linear, "__getattr__", lambda self, n: None),
    "a note of Linear": lambda net: replaced(nn.Linear, "note", "of no importance"),
    "F.linear": lambda net: replaced(nn.functional, "linear", lambda *a: None),
    "F.relu": lambda net: replaced(nn.functional, "relu", lambda *a, **k: None),
    "torch.relu": lambda net: replaced(torch, "relu", lambda x: x),
    "__iter__ of ReluMLP": lambda net: replaced(ReluMLP, "__iter__", lambda self: iter(())),
    "a subclass of Linear": lambda net: net.__setitem__(2, OwnLinear(6, 5)),
    "a class of parameters": lambda net: setattr(
        net[2], "weight", OwnParameter(net[2].weight.detach())
    ),
    "a meta weight": lambda net: net[2].to("meta"),
    "all in meta": lambda net: net.to("meta"),
    "a weight in double": lambda net: net[2].double(),
    "a weight in bfloat16": lambda net: net[0].bfloat16(),
    "an MKLDNN weight": lambda net: net[2]._parameters.update(
        weight=net[2].weight.detach().to_mkldnn()
    ),
    "a complex weight": lambda net: net[2]._parameters.update(weight=net[2].weight.detach() + 0j),
    "a lazy negative weight": lambda net: net[2]._parameters.update(
        weight=torch.complex(net[2].weight, -net[2].weight).detach().conj().imag
    ),
    "a dual weight": lambda net: dual(net[2]),
    "random pruning": lambda net: prune.random_unstructured(net[0], "weight", 0.5),
    "weight norm": lambda net: nn.utils.parametrizations.weight_norm(net[2]),
    "a Softplus": lambda net: net.append(nn.Softplus()),
    "a Softplus of its own": lambda net: net.append(nn.Softplus(beta=2)),
    "a Tanh": lambda net: net.append(nn.Tanh()),
    "a Tanh with a hook": lambda net: net.append(hooked(nn.Tanh())),
    "a ReLU at the end": lambda net: net.append(nn.ReLU()),
    "an in-place ReLU": lambda net: net.__setitem__(1, nn.ReLU(inplace=True)),
    "forward of Tanh": lambda net: (
        net.append(nn.Tanh()),
        replaced(nn.Tanh, "forward", lambda self, x: x),
    )[1],
    "torch.tanh": lambda net: (
        net.append(nn.Tanh()),
        replaced(torch, "tanh", lambda x: x),
    )[1],
    "two ReLUs": lambda net: net.insert(1, nn.ReLU()),
    "a first ReLU": lambda net: net.insert(0, nn.ReLU()),
    "no children": lambda net: net.__delitem__(slice(None)),
    "one Linear": lambda net: net.__delitem__(slice(1, None)),
}

#: Changes that the node leaves to Python, although the operators serve the network.
LEFT_TO_PYTHON = {
    "parameters_that_are_fetched",
    "a Softplus",
    "a lazy negative weight",
    "a dual weight",
    "a weight in bfloat16",
    # their dict of children is an OrderedDict
    "modules_replaced",
    "a_sigmoid_at_the_end_and_away_again",
    "one Linear",
}


def hooked(module):
    module.register_forward_hook(nothing)
    return module


@contextmanager
def dual(layer):
    with forward_ad.dual_level():
        weight = layer.weight.detach()
        layer._parameters["weight"] = forward_ad.make_dual(weight, torch.ones_like(weight))
        yield


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # at the first tangent
@pytest.mark.parametrize("name", CHANGES)
def test_the_node_serves_what_the_operators_may_serve(name):
    """It may leave a call to Python, but must not serve one that Python would not."""
    net, x = test_children.pair()[0], test_children.integers(7, 3)
    ops.node.call_module(net, x)
    change = CHANGES[name](net)
    with change if hasattr(change, "__exit__") else nullcontext():
        found = outcome(lambda: ops.node.call_module(net, x))
        network = outcome(lambda: run.network_of(net))
        may_serve = (
            network is not None
            and not interception.are_layers_replaced()
            and type(net).__iter__ is interception.iterate
        )
        if not may_serve or not isinstance(network[0], list) or name in LEFT_TO_PYTHON:
            assert found is NotImplemented
            return
        weights, biases, activation = network
        with support.node_enabled(False):
            expected = outcome(lambda: R.relu_mlp(x, weights, biases, activation))
        if isinstance(expected, tuple):
            assert found == expected or found is NotImplemented
        else:
            support.assert_same(found, expected)


#: Changes of children that do nothing.
DO_NOTHING = {
    "nothing": nothing,
    "training": lambda model: model.train(),
    "a hook of the Dropout": lambda model: hooked(model[1]),
    "a hook of the Identity": lambda model: hooked(model[3]),
    "p": lambda model: setattr(model[1], "p", 0.0) or model.train(),
    "p out of range": lambda model: setattr(model[1], "p", 1.5),
    "p of another kind": lambda model: setattr(model[1], "p", torch.tensor(0.5)),
    "forward of Dropout": lambda model: replaced(nn.Dropout, "forward", lambda self, x: 2 * x),
    "F.dropout": lambda model: replaced(nn.functional, "dropout", lambda x, *a: 2 * x),
    "forward of Identity": lambda model: replaced(nn.Identity, "forward", lambda self, x: 2 * x),
    "__call__ of Identity": lambda model: replaced(nn.Identity, "__call__", lambda self, x: 2 * x),
    "a class of its own": lambda model: setattr(model[3], "__class__", OwnIdentity),
    "forward of the instance": lambda model: setattr(model[3], "forward", torch.neg),
}


class OwnIdentity(nn.Identity):
    def forward(self, x):
        return 2 * x


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # at the first tangent
@pytest.mark.parametrize(
    "name", [*CHANGES, *(f"{name}, which does nothing" for name in DO_NOTHING)]
)
def test_a_fused_sequential_is_read_as_in_python(name):
    """The same output with the node and without it, or the same error."""
    change = {**CHANGES, **{f"{n}, which does nothing": DO_NOTHING[n] for n in DO_NOTHING}}[name]
    model = nn.Sequential(*test_children.pair()[1], nn.Softshrink())
    if change in DO_NOTHING.values():
        model.insert(1, nn.Dropout(0.5))
        model.insert(3, nn.Identity())
        model.eval()
    model, x = relu_mlp.fuse(model), test_children.integers(7, 3)
    undone = change(model)

    def call():
        torch.manual_seed(0)
        return model(x)

    with undone if hasattr(undone, "__exit__") else nullcontext():
        found = outcome(call)
        with support.node_enabled(False):
            expected = outcome(call)
    if isinstance(expected, torch.Tensor) and not expected.is_meta:
        support.assert_same(found, expected)
    else:
        assert isinstance(expected, torch.Tensor) or found == expected


# -- Threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
def test_many_threads_differentiate_one_graph(recompute):
    """First and second derivatives of one network and of one graph, in all threads at once."""
    threads, turns = 6, 40
    net = network(recompute=recompute)
    native = nn.Sequential(*net)
    x = integers(4, 3).requires_grad_()
    inputs = [x, *net.parameters()]
    shared = net(x)
    start = threading.Barrier(threads)

    def derivatives(y):
        first = torch.autograd.grad(y.sum(), inputs, create_graph=True)
        penalty = first[0].square().sum()
        settings = {"retain_graph": True, "materialize_grads": True}
        return [*first, *torch.autograd.grad(penalty, inputs, **settings)]

    def work(_):
        start.wait(60)
        return [derivatives(y) for _ in range(turns) for y in (shared, net(x))]

    with ThreadPoolExecutor(threads) as pool:
        results = [one for several in pool.map(work, range(threads)) for one in several]
    expected = derivatives(native(x))
    assert len(results) == threads * turns * 2
    for found in results:
        for pair in zip(found, expected, strict=True):
            support.assert_same(*pair)


@pytest.mark.parametrize("way", ["module", "function", "backward"])
def test_other_threads_run_during_a_call(way):
    net = ReluMLP(1000, [1000] * 4, 1000)
    x, ticks, is_done = torch.randn(500, 1000), [0], threading.Event()

    def tick():
        while not is_done.is_set():
            ticks[0] += 1
            time.sleep(1e-4)

    ticking = threading.Thread(target=tick)
    ticking.start()
    try:
        calls = {
            "module": lambda: net(x),
            "function": lambda: relu_mlp.relu_mlp(x, *support.layers_of(net)),
            "backward": net(x).sum().backward,
        }
        before = ticks[0]
        calls[way]()
        # A call that keeps the GIL lets the thread run before it and after it at most.
        assert ticks[0] - before > 3
    finally:
        is_done.set()
        ticking.join()


# -- Memory ----------------------------------------------------------------------------------------


def second_derivative(net, x):
    (by_x,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    by_x.square().sum().backward()


def with_an_error(net, x):
    with pytest.raises(RuntimeError):
        net(x[:, 1:])
    y = net(x)
    with pytest.raises(RuntimeError):
        y.backward(y[1:])


def with_hooks(net, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        y = net(x)
    y.grad_fn.register_prehook(lambda grads: tuple(g if g is None else 2 * g for g in grads))
    y.sum().backward()


REPEATED = {
    "inference": lambda net, x: in_no_grad(lambda: net(x)),
    "a graph that is dropped": lambda net, x: net(x),
    "training": lambda net, x: net(x).sum().backward(),
    "two backward passes": lambda net, x: [
        net(x).sum().backward(retain_graph=True),
        net(x).sum().backward(),
    ],
    "a second derivative": second_derivative,
    "errors": with_an_error,
    "hooks": with_hooks,
    "a call for Python": lambda net, x: net(x.detach().T.contiguous().T).sum().backward(),
    "a function": lambda net, x: relu_mlp.relu_mlp(x, *support.layers_of(net)).sum().backward(),
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's statistics")
@pytest.mark.parametrize("name", REPEATED)
def test_no_memory_is_lost(name):
    """Neither memory, of which each tensor of a call has a megabyte, nor references to objects."""
    net = ReluMLP(64, [128, 128], 64)
    x = torch.randn(4096, 64, requires_grad=True)
    objects = [x, *net.parameters(), *net.children(), net, net._modules, None, NotImplemented]

    def used():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    for turn in range(40):
        net.recompute = turn % 2 == 1
        if turn == 10:  # by now the allocator has what it needs
            before, references = used(), [sys.getrefcount(o) for o in objects]
        REPEATED[name](net, x)
        net.zero_grad()
        x.grad = None
    assert used() - before < 10e6
    # None and NotImplemented are used by others too.
    for o, count in zip(objects, references):
        assert sys.getrefcount(o) - count < 40, type(o)


# -- What it makes once ---------------------------------------------------------------------------


def test_the_first_call_may_be_in_inference_mode():
    """A tensor that stands for missing biases is made in the first call, and saved in others."""
    script = """
        import torch, relu_mlp
        net = relu_mlp.ReluMLP(3, [4, 5], 2, output_activation="tanh", recompute=True)
        net[0].bias = None
        x = torch.randn(5, 3, requires_grad=True)
        with torch.inference_mode():
            assert relu_mlp.ops.node.call_module(net, x.detach()) is not NotImplemented
        (by_x,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        by_x.square().sum().backward()
    """
    root = str(Path(relu_mlp.__file__).parent.parent)
    command = [sys.executable, "-c", textwrap.dedent(script)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, check=True)


# -- Errors in what the node calls -----------------------------------------------------------------


class Ours(BaseException):
    """As KeyboardInterrupt, no Exception."""


def failing(*arguments):
    raise Ours("in Python")


def test_an_exception_in_a_kernel_passes_through(monkeypatch):
    x, weights, biases = support.integer_case([3, 4, 5, 2], 4)
    x.requires_grad_()
    (by_x,) = torch.autograd.grad(
        relu_mlp.relu_mlp(x, weights, biases, output_activation="tanh").sum(), x, create_graph=True
    )
    monkeypatch.setattr(autograd, "implementation_for", failing)
    with relu_mlp.backend("reference"), pytest.raises(Ours, match="in Python"):
        R.relu_mlp(x, weights, biases, "none")  # the kernel in Python serves the reference
    monkeypatch.setattr(second_order, "backward_vjp", failing)
    with pytest.raises(Ours, match="in Python") as caught:
        torch.autograd.grad(by_x.sum(), x, create_graph=True)
    assert caught.traceback[-1].name == "failing"


def test_an_unknown_backend_is_named(monkeypatch):
    monkeypatch.setattr(ops.this_thread, "backend", "fastest")
    x, weights, biases = support.integer_case([3, 4, 5, 2], 4)
    for function in (relu_mlp.relu_mlp, R.relu_mlp):
        with pytest.raises(ValueError, match="must be 'auto', 'extension' or 'reference'"):
            function(x.requires_grad_(), weights, biases)
