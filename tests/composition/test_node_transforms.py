"""What the native node serves of vmap itself, and what it hands to the Python kernels.

Both have to give the same: a call is made with the node, and again with `node.enable(False)`.
"""

from __future__ import annotations

import pytest
import torch
from torch import vmap
from torch.func import functional_call, grad, jacrev, vjp
from torch.utils._pytree import tree_flatten

import relu_mlp
from relu_mlp import batching, ops
from support import assert_same, integer_network, integers
from support.transforms import loss

pytestmark = pytest.mark.skipif(ops.node is None, reason="the native node was not built")
operators = torch.ops.relu_mlp
EXAMPLES, ROWS, SIZES = 3, 4, [2, 5, 3]


@pytest.fixture
def python_calls(monkeypatch):
    """The names of the Python functions that were called."""
    calls = []

    def count(module, name):
        function = getattr(module, name)

        def counted(*arguments, **named):
            calls.append(name)
            return function(*arguments, **named)

        monkeypatch.setattr(module, name, counted)

    count(batching, "current_interpreter")
    return calls


def outcome(function):
    """The results of a call, or its error."""
    try:
        return tree_flatten(function())[0]
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]


def compare(function, calls, by_node):
    """Asserts that the node gives what Python gives, and serves the call by itself or not."""
    results = outcome(function)
    assert (not calls) == by_node, calls
    outer = ops.node.enable(False)
    try:
        expected = outcome(function)
    finally:
        ops.node.enable(outer)
    assert calls  # by Python this time
    assert len(results) == len(expected)
    for result, other in zip(results, expected, strict=True):
        if isinstance(result, str) or isinstance(other, str):
            assert result == other
        else:
            assert_same(result, other)


class Problem:
    def __init__(self, activation="none", shape=(ROWS,), examples=EXAMPLES, dtype=torch.float64):
        torch.manual_seed(0)
        self.activation = activation
        self.weights, self.biases = integer_network(SIZES, "all", dtype, requires_grad=False)
        self.x = integers(examples, *shape, SIZES[0], dtype=dtype)
        self.grad_output = integers(examples, *shape, SIZES[-1], dtype=dtype)
        y, hidden = operators.forward(self.x, self.weights, self.biases, activation, True)
        self.y, self.hidden = y, [a.reshape(examples, -1, a.shape[1]) for a in hidden]

    def call(self, x, weights=None, biases=None):
        return operators.relu_mlp(
            x, weights or self.weights, self.biases if biases is None else biases, self.activation
        )

    def saved(self, needs):
        return relu_mlp.reference.pack(
            self.x, self.y, self.weights, self.hidden, self.activation, needs
        )

    def batched_saved(self, needs):
        """One dimension for each of `saved`."""
        return relu_mlp.reference.pack(
            0, 0, [None] * len(self.weights), [0] * len(self.hidden), self.activation, needs
        )

    def backward(self, needs):
        return lambda grad, saved: operators.backward(grad, saved, self.activation, needs)


def loss_of(p):
    return lambda parameters, x: loss(p.call(x, parameters[:2], parameters[2:]))


SERVED = {
    "inputs": lambda p: vmap(p.call)(p.x),
    "inputs, last dimension": lambda p: vmap(p.call, in_dims=-1)(p.x.movedim(0, -1)),
    "inputs of inputs": lambda p: vmap(vmap(p.call))(p.x.expand(2, *p.x.shape)),
    "inputs of columns": lambda p: vmap(vmap(p.call), in_dims=1)(p.x.expand(2, *p.x.shape)),
    "nothing at the inner level": lambda p: vmap(lambda x: vmap(lambda _: p.call(x))(p.x))(p.x),
    "hidden activations": lambda p: vmap(
        lambda x: operators.forward(x, p.weights, p.biases, p.activation, True)
    )(p.x),
    "no biases": lambda p: vmap(lambda x: p.call(x, biases=[]))(p.x),
    "gradients of parameters": lambda p: vmap(grad(loss_of(p)), in_dims=(None, 0))(
        [*p.weights, *p.biases], p.x
    ),
    "gradients of inputs": lambda p: vmap(grad(lambda x: loss(p.call(x))))(p.x),
    "gradients of all": lambda p: vmap(grad(loss_of(p), argnums=(0, 1)), in_dims=(None, 0))(
        [*p.weights, *p.biases], p.x
    ),
    "many gradients of one pass": lambda p: vmap(
        vjp(lambda *q: p.call(q[0], q[1:3], q[3:]), p.x, *p.weights, *p.biases)[1]
    )(torch.stack([p.grad_output, -2 * p.grad_output])),
    "jacobian": lambda p: jacrev(lambda *q: p.call(p.x, q[:2], q[2:]), argnums=(0, 1, 2, 3))(
        *p.weights, *p.biases
    ),
    "jacobian by x": lambda p: jacrev(p.call)(p.x),
}


@pytest.mark.parametrize("shape", [(), (ROWS,), (1, 2), (0,)], ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("case", SERVED)
def test_served_by_the_node(case, activation, shape, python_calls):
    p = Problem(activation, shape)
    if shape == () and case == "inputs of columns":
        p.x = p.x.expand(EXAMPLES, SIZES[0])
    compare(lambda: SERVED[case](p), python_calls, by_node=True)


@pytest.mark.parametrize("needs", ["10000", "01000", "00100", "00001", "11111", "01010"])
@pytest.mark.parametrize("activation", ["none", "tanh"])
@pytest.mark.parametrize("batched", ["all", "grad_output", "saved"])
def test_every_need(batched, activation, needs, python_calls):
    p, one = Problem(activation), Problem(activation, examples=1)
    saved, dims, grad, dim = p.saved(needs), p.batched_saved(needs), p.grad_output, 0
    if batched == "grad_output":
        dims = [None] * len(saved)
        saved = [t[0] if t.dim() == 3 else t for t in one.saved(needs)]
    elif batched == "saved" and 0 in dims:
        dim, grad = None, one.grad_output[0]
    backward = p.backward(needs)

    def at_an_inner_level(grad, saved):
        return vmap(lambda _: backward(grad, saved))(p.x)

    compare(lambda: vmap(backward, in_dims=(dim, dims))(grad, saved), python_calls, by_node=True)
    python_calls.clear()
    inner = vmap(at_an_inner_level, in_dims=(dim, dims))
    compare(lambda: inner(grad, saved), python_calls, by_node=True)


def test_a_gradient_outside(python_calls):
    p = Problem("relu")
    parameters = [t.requires_grad_() for t in (*p.weights, *p.biases)]

    def derivatives():
        each = vmap(grad(loss_of(p)), in_dims=(None, 0))(parameters, p.x)
        return torch.autograd.grad(sum(map(loss, each)), parameters)

    compare(derivatives, python_calls, by_node=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, python_calls):
    p = Problem("relu", dtype=dtype)
    for case in ("inputs", "gradients of all", "jacobian"):
        python_calls.clear()
        compare(lambda c=case: SERVED[c](p), python_calls, by_node=True)


def stacked(tensors):
    return [torch.stack([t, -t, 2 * t]) for t in tensors]


HANDED_OVER = {
    "weights": lambda p: vmap(lambda w: p.call(p.x[0], w))(stacked(p.weights)),
    "biases": lambda p: vmap(lambda b: p.call(p.x[0], None, b))(stacked(p.biases)),
    "an ensemble's gradients": lambda p: vmap(grad(loss_of(p)), in_dims=(0, None))(
        stacked([*p.weights, *p.biases]), p.x[0]
    ),
    "no features": lambda p: vmap(p.call)(torch.ones(EXAMPLES, dtype=torch.float64)),
    "no flags": lambda p: vmap(p.backward("1"), in_dims=(0, None))(p.grad_output, []),
    "no needs": lambda p: vmap(p.backward("00000"), in_dims=(0, None))(p.grad_output, []),
    "saved too little": lambda p: vmap(p.backward("10000"), in_dims=(0, None))(
        p.grad_output, p.weights[:1]
    ),
    "an unknown activation": lambda p: vmap(
        lambda grad: operators.backward(grad, p.weights, "sine", "10000")
    )(p.grad_output),
}


@pytest.mark.parametrize("case", HANDED_OVER)
def test_handed_to_python(case, python_calls):
    compare(lambda: HANDED_OVER[case](Problem()), python_calls, by_node=False)


def test_errors_of_the_operator(python_calls):
    p = Problem()
    narrow, other = p.x[..., :1], p.x.float()
    compare(lambda: vmap(p.call)(narrow), python_calls, by_node=True)
    python_calls.clear()
    compare(lambda: vmap(p.call)(other), python_calls, by_node=True)


def test_the_reference_in_force(python_calls):
    p = Problem()
    with relu_mlp.backend("reference"):
        compare(lambda: vmap(p.call)(p.x), python_calls, by_node=False)


def test_modules(python_calls, monkeypatch):
    """A module reaches its operator without Python, also where its parameters are replaced."""
    net = relu_mlp.ReluMLP(2, 5, 3, dtype=torch.float64)
    x = integers(EXAMPLES, 2)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss_of_net(parameters, x):
        return loss(functional_call(net, parameters, (x,)))

    gradients = vmap(grad(loss_of_net), in_dims=(None, 0))
    compare(lambda: gradients(parameters, x), python_calls, by_node=True)
    python_calls.clear()
    monkeypatch.setattr("relu_mlp.modules.call_operators", None)
    gradients(parameters, x)
    assert not python_calls


def test_a_hook_under_a_transform():
    """Hooks see the native layers under a transform too."""
    net = relu_mlp.ReluMLP(2, 5, 3, dtype=torch.float64)
    seen = []
    net[0].register_forward_hook(lambda *_: seen.append(True))
    vmap(net)(integers(EXAMPLES, 2))
    assert seen
