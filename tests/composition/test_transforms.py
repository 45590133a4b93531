"""Derivatives taken by torch.func and by forward-mode automatic differentiation, of any order,
against the same derivative of the native path.

Integer networks make every sum exact. So without an output activation, and with ReLU, the bits must
agree. With sigmoid and tanh the pre-activations are still exact, and the results must lie within
the bounds of support/bounds.py.
"""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
)
from torch.utils._pytree import tree_flatten, tree_map

import support
from relu_mlp import reference, relu_mlp, second_order
from support import (
    BIASES,
    assert_same,
    assert_within,
    gamma,
    integer_network,
    integers,
    majorant,
    native_mlp,
    outcome,
    patterns,
)
from support.transforms import SIZES, compare, dot, loss, of_loss, of_names, problem

# PyTorch's own forward mode compiles its rules with TorchScript, which is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
activations = pytest.mark.parametrize("activation", support.ACTIVATIONS, ids=str)


# -- The derivatives by themselves -------------------------------------------------------


def backward_arguments(activation, needs, sizes):
    """grad_output, and the tensors saved for a backward pass."""
    primals, _, _, grad_output = problem(activation, sizes=sizes)
    layers = range(len(sizes) - 1)
    weights, biases = ([primals[f"{kind}[{n}]"] for n in layers] for kind in ("weights", "biases"))
    y, hidden = reference.forward(primals["x"], weights, biases, activation, True)
    kept = reference.is_kept(activation, needs)
    return [grad_output, *itertools.compress([primals["x"], y, *weights, *hidden], kept)]


def backward_majorant(arguments, activation, needs):
    """`reference.backward` without masks, whose activation has the terms of sigmoid and tanh."""
    layers = len(needs) // 2
    y, weights, inputs = reference.unpack(arguments[1:], activation, needs)
    # (1 - y) y and 1 - y y, and their derivatives
    delta = arguments[0] if y is None else arguments[0] * (1 + y).square()
    results = [None] * len(needs)
    for layer in reversed(range(reference.lowest_layer(needs), layers)):
        if needs[1 + layer] == "1":
            results[1 + layer] = delta.T @ inputs[layer]
        if needs[1 + layers + layer] == "1":
            results[1 + layers + layer] = delta.sum(0)
        if weights[layer] is not None:
            delta = delta @ weights[layer]
    if needs[0] == "1":
        results[0] = delta
    return [result for result in results if result is not None]


def assert_agree(actual, expected, magnitudes, activation):
    """Replaces None among `actual` by 0."""
    for n, (ours, theirs, magnitude) in enumerate(zip(actual, expected, magnitudes, strict=True)):
        ours = torch.zeros_like(theirs) if ours is None else ours
        if activation in ("none", "relu"):
            assert_same(ours, theirs, f"result {n}")
        else:
            assert_within(ours, theirs, 2 * gamma(8, max(SIZES)) * magnitude, f"result {n}")


def backward_functions(activation, needs):
    """The backward pass and its majorant as functions of `backward_arguments`."""
    return (
        lambda *arguments: reference.backward(arguments[0], arguments[1:], activation, needs),
        lambda *arguments: backward_majorant(arguments, activation, needs),
    )


def patterns_of_needs(layers):
    """All strings of `needs` that request something."""
    return ["".join("01"[need] for need in pattern) for pattern in patterns(1 + 2 * layers)][1:]


def zero_where_none(items, like):
    return [torch.zeros_like(t) if item is None else item for item, t in zip(items, like)]


def some_of(items):
    """All copies of a list with some items replaced by None."""
    for given in patterns(len(items)):
        yield [item if is_given else None for item, is_given in zip(items, given)]


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("layers", [1, 2])
def test_vjp_of_the_backward_pass(layers, activation):
    """For every pattern of wanted gradients, and of cotangents that arrive at them."""
    for needs in patterns_of_needs(layers):
        arguments = backward_arguments(activation, needs, SIZES[: 1 + layers])
        native, larger = backward_functions(activation, needs)
        results, native_vjp = vjp(native, *arguments)
        sizes, majorant_vjp = vjp(larger, *map(torch.abs, arguments))
        assert len(sizes) == len(results)
        for cotangents in some_of([integers(*result.shape) for result in results]):
            actual = second_order.backward_vjp(
                arguments[0], arguments[1:], activation, needs, cotangents
            )
            full = zero_where_none(cotangents, results)
            bounds = majorant_vjp([cotangent.abs() for cotangent in full])
            assert_agree(actual, native_vjp(full), bounds, activation)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("layers", [1, 2])
def test_jvp_of_the_backward_pass(layers, activation):
    """For every pattern of wanted gradients, and of arguments with a tangent."""
    for needs in patterns_of_needs(layers):
        arguments = backward_arguments(activation, needs, SIZES[: 1 + layers])
        native, larger = backward_functions(activation, needs)
        tangents = [integers(*argument.shape) for argument in arguments]
        zeros = [torch.zeros_like(argument) for argument in arguments]
        # The derivative is linear: one tangent at a time, and then their sums.
        expected, bounds = [], []
        for n, tangent in enumerate(tangents):
            alone = [*zeros[:n], tangent, *zeros[n + 1 :]]
            expected.append(jvp(native, tuple(arguments), tuple(alone))[1])
            absolute = (tuple(t.abs() for t in tensors) for tensors in (arguments, alone))
            bounds.append(jvp(larger, *absolute)[1])
        for some in some_of(tangents):
            actual = second_order.backward_jvp(
                arguments[0], arguments[1:], activation, needs, some[0], some[1:]
            )
            given = [tangent is not None for tangent in some]
            sums = [
                [sum(column, torch.zeros_like(ours)) for column, ours in zip(zip(*rows), actual)]
                if any(given)
                else [torch.zeros_like(ours) for ours in actual]
                for rows in (
                    list(itertools.compress(expected, given)),
                    list(itertools.compress(bounds, given)),
                )
            ]
            assert_agree(actual, *sums, activation)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("layers", [1, 2])
def test_jvp_of_the_network(layers, activation):
    """`reference.jvp`, for every pattern of arguments with a tangent."""
    sizes = SIZES[: 1 + layers]
    name = None if activation == "none" else activation
    primals, tangents, _, _ = problem(name, sizes=sizes)
    weights = [primals[f"weights[{n}]"] for n in range(layers)]
    biases = [primals[f"biases[{n}]"] for n in range(layers)]
    y, hidden = reference.forward(primals["x"], weights, biases, activation, True)

    def derivative(network, primals, tangents):
        function = of_names(network, name, layers)
        return [jvp(function, (primals,), (tangents,))[1]]

    for some in some_of(list(tangents.values())):
        full = dict(zip(tangents, zero_where_none(some, tangents.values())))
        actual, changes = reference.jvp(
            primals["x"],
            y,
            weights,
            hidden,
            activation,
            some[0],
            some[1 : 1 + layers],
            some[1 + layers :],
        )
        assert [change.shape for change in changes] == [a.shape for a in hidden]
        expected = derivative(native_mlp, primals, full)
        bounds = derivative(majorant, *tree_map(torch.abs, (primals, full)))
        assert_agree([actual], expected, bounds, activation)


# -- torch.func --------------------------------------------------------------------------
#
# f is the network as a function of a dict of its tensors, and p is that dict. t and s are tangents
# of p, and g is a gradient for the output. The number is the order of the highest derivative.


def rev(f, t):
    """The derivative of f at p along t, by reverse mode. f returns a number."""
    return lambda p: dot(grad(f)(p), t)


def fwd(f, t):
    """The derivative of f at p along t, by forward mode."""
    return lambda p: jvp(f, (p,), (t,))[1]


TRANSFORMS = {
    "grad": (1, lambda f, p, t, s, g: grad(of_loss(f))(p)),
    "vjp": (1, lambda f, p, t, s, g: vjp(f, p)[1](g)),
    "jvp": (1, lambda f, p, t, s, g: jvp(f, (p,), (t,))),
    "jacrev": (1, lambda f, p, t, s, g: jacrev(f)(p)),
    "jacfwd": (1, lambda f, p, t, s, g: jacfwd(f)(p)),
    "hessian": (2, lambda f, p, t, s, g: hessian(of_loss(f))(p)),
    "forward over reverse": (2, lambda f, p, t, s, g: jvp(grad(of_loss(f)), (p,), (t,))),
    "reverse over forward": (2, lambda f, p, t, s, g: grad(fwd(of_loss(f), t))(p)),
    "reverse over reverse": (2, lambda f, p, t, s, g: grad(rev(of_loss(f), t))(p)),
    "forward over forward": (2, lambda f, p, t, s, g: fwd(fwd(f, t), s)(p)),
    "reverse, reverse, reverse": (
        3,
        lambda f, p, t, s, g: grad(rev(rev(of_loss(f), t), s))(p),
    ),
    "forward, forward, forward": (3, lambda f, p, t, s, g: fwd(fwd(fwd(f, t), s), t)(p)),
    "forward, forward, reverse": (
        3,
        lambda f, p, t, s, g: fwd(fwd(grad(of_loss(f)), t), s)(p),
    ),
    "reverse, forward, forward": (3, lambda f, p, t, s, g: grad(fwd(fwd(of_loss(f), t), s))(p)),
    "forward, reverse, forward": (3, lambda f, p, t, s, g: fwd(grad(fwd(of_loss(f), t)), s)(p)),
    "reverse, forward, reverse": (3, lambda f, p, t, s, g: grad(fwd(rev(of_loss(f), t), s))(p)),
    "reverse, reverse, forward": (3, lambda f, p, t, s, g: grad(rev(fwd(of_loss(f), t), s))(p)),
    "forward, reverse, reverse": (3, lambda f, p, t, s, g: fwd(grad(rev(of_loss(f), t)), s)(p)),
}


@activations
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform(backend, transform, activation):
    order, function = TRANSFORMS[transform]
    # Every transform with every pattern of biases, but not with every activation.
    one = BIASES[list(TRANSFORMS).index(transform) % 3]
    for bias in BIASES if activation == "relu" else [one]:
        compare(function, activation, problem(activation, bias), order)


@pytest.mark.parametrize("shape", [(), (2, 1, 2), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("transform", list(TRANSFORMS)[:10])
def test_shapes_of_x(backend, transform, shape):
    order, function = TRANSFORMS[transform]
    for activation, sizes in ((None, [2, 2]), ("tanh", [2, 3, 2])):
        compare(function, activation, problem(activation, "all", shape, sizes), order, sizes)


@pytest.mark.parametrize("sizes", [[0, 2, 2], [2, 0, 2], [2, 2, 0]], ids=str)
@pytest.mark.parametrize("transform", list(TRANSFORMS)[:10])
def test_sizes_of_0(backend, transform, sizes):
    order, function = TRANSFORMS[transform]
    compare(function, "relu", problem("relu", sizes=sizes), order, sizes)


@pytest.mark.parametrize("transform", list(TRANSFORMS)[:10])
def test_float32(backend, transform):
    order, function = TRANSFORMS[transform]
    for activation in ("relu", "tanh"):
        arguments = problem(activation, "some", dtype=torch.float32)
        compare(function, activation, arguments, order)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
# PyTorch folds constants of the graph that it records, and warns about its own nodes.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
def test_linearize(backend, activation):
    sizes = [2, 3, 2]
    arguments = problem(activation, sizes=sizes)
    compare(lambda f, p, t, s, g: linearize(f, p)[1](t), activation, arguments, 1, sizes)


@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian", "forward over forward"])
def test_nan_and_infinity(backend, transform):
    """The mask passes NaN and stops an infinite tangent or gradient at a unit that is off."""
    inf = float("inf")
    primals, tangents, s, g = problem(None)
    primals["x"] = torch.tensor([[float("nan"), 1], [1, 2]], dtype=torch.float64)
    # A unit that is off, except where x is NaN.
    primals["weights[0]"][0], primals["biases[0]"][0] = 0, -1
    tangents["biases[0]"][0] = inf
    s["weights[1]"][0, 1] = -inf
    order, function = TRANSFORMS[transform]
    compare(function, None, (primals, tangents, s, g), order)
    compare(function, "relu", (primals, tangents, s, g), order)


def without_grad(function, p):
    """A number times the value of the function of p under no_grad."""
    with torch.no_grad():
        value = function(p)
    return value * loss(p["x"])


WITH_NO_GRAD = {
    "in grad": lambda f, p, t, s, g: grad(lambda p: without_grad(of_loss(f), p))(p),
    "in jvp": lambda f, p, t, s, g: fwd(lambda p: without_grad(of_loss(f), p), t)(p),
    "around jvp, in grad": lambda f, p, t, s, g: grad(
        lambda p: without_grad(fwd(of_loss(f), t), p)
    )(p),
    "in jvp, in grad": lambda f, p, t, s, g: grad(fwd(lambda p: without_grad(of_loss(f), p), t))(p),
    "in grad, in jvp": lambda f, p, t, s, g: fwd(grad(lambda p: without_grad(of_loss(f), p)), t)(p),
    "around grad": lambda f, p, t, s, g: without_grad(lambda p: loss(grad(of_loss(f))(p)["x"]), p),
    "detached, in jvp, in grad": lambda f, p, t, s, g: grad(
        fwd(lambda p: loss(f(p)) * loss(f(p).detach()), t)
    )(p),
}


@pytest.mark.parametrize("transform", WITH_NO_GRAD)
def test_no_grad(backend, transform):
    compare(WITH_NO_GRAD[transform], "relu", problem("relu"), 2)


# -- torch.autograd.forward_ad -----------------------------------------------------------


def dual(p, t):
    return {name: forward_ad.make_dual(p[name], t[name]) if name in t else p[name] for name in p}


def tangent_of(tensor):
    tangent = forward_ad.unpack_dual(tensor).tangent
    return torch.zeros_like(tensor) if tangent is None else tangent


@activations
def test_dual_of_some(backend, activation):
    """The tangent of the output, with a tangent on one tensor or on several."""
    p, t, *_ = problem(activation)

    def tangent(f, p, t):
        with forward_ad.dual_level():
            return tangent_of(f(dual(p, t)))

    layers = range(len(SIZES) - 1)
    some = [[name] for name in p] + [[f"weights[{n}]" for n in layers], ["x", "biases[1]"], list(p)]
    for names in some:
        compare(tangent, activation, (p, {name: t[name] for name in names}), 1)


@activations
def test_dual_and_backward(backend, activation):
    """Hessian-vector products: a backward pass inside the level."""
    p, t, _, g = problem(activation, "some")

    def product(f, p, t, g):
        p = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
        with forward_ad.dual_level():
            y = f(dual(p, t))
            grads = torch.autograd.grad(loss(y), list(p.values()), create_graph=True)
            products = [tangent_of(grad) for grad in grads]
            third = torch.autograd.grad(sum((a * a).sum() for a in products), list(p.values()))
        return [tensor.detach() for tensor in (*grads, *products, *third)]

    for names in (["x"], ["weights[0]"], ["biases[0]", "weights[2]"], list(p)):
        compare(product, activation, (p, {name: t[name] for name in names}, g), 3)


@activations
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_dual_grad_output(backend, recompute, activation):
    """The graph was made outside of the level, and the gradient that arrives carries a tangent."""

    def network(*arguments, **options):
        return relu_mlp(*arguments, recompute=recompute, **options)

    def product(f, p, t, s, g):
        p = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
        y = f(p)
        with forward_ad.dual_level():
            grads = torch.autograd.grad(y, list(p.values()), forward_ad.make_dual(g, 2 * g))
            return [*map(tangent_of, grads), *[grad.detach() for grad in grads]]

    compare(product, activation, problem(activation), 1, network=network)


def test_dual_of_what_needs_no_gradient_below(backend):
    """The tangent needs a gradient and the primal does not, and vice versa."""
    p, t, _, g = problem("tanh")

    def gradients(f, p, t, g):
        t = {name: tensor.clone().requires_grad_() for name, tensor in t.items()}
        with forward_ad.dual_level():
            change = tangent_of(f(dual(p, t)))
        return list(torch.autograd.grad(change, list(t.values()), g))

    compare(gradients, "tanh", (p, t, g), 2)


def test_change_between_forward_and_tangent(backend):
    """y is changed in place inside the level, and its tangent with it."""

    def changed(f, p, t):
        with forward_ad.dual_level():
            y = f(dual(p, t))
            y.mul_(2)
            y += y.detach().abs()
            return tangent_of(y), forward_ad.unpack_dual(y).primal

    compare(changed, "relu", problem("relu")[:2], 1)


# -- Changes in place, and tensors that outlive their level ----------------------------------


def weight_changed_in_grad(f, p):
    def changed(x):
        weight = p["weights[2]"] * x.sum()
        y = f({**p, "x": x, "weights[2]": weight})
        weight.mul_(2)
        return loss(y)

    return grad(changed)(p["x"])


def y_changed_in_grad(f, p):
    return grad(lambda x: loss(f({**p, "x": x}).add_(1)))(p["x"])


def y_changed_in_jacobians(f, p):
    def changed(x):
        return f({**p, "x": x}).mul_(2)

    return jacfwd(changed)(p["x"])


def weight_changed_after_vmap(f, p):
    x, weight = p["x"].clone().requires_grad_(), p["weights[2]"].clone().requires_grad_()
    y = torch.vmap(lambda x: f({**p, "x": x, "weights[2]": weight}))(x)
    with torch.no_grad():
        weight.add_(1)
    return torch.autograd.grad(y.sum(), x)[0]


def weight_changed_after_dual(f, p):
    x, weight = p["x"].clone().requires_grad_(), p["weights[2]"].clone().requires_grad_()
    with forward_ad.dual_level():
        y = f({**p, "x": forward_ad.make_dual(x, x.detach()), "weights[2]": weight})
        with torch.no_grad():
            weight.add_(1)
        return torch.autograd.grad(y.sum(), x)[0]


def output_of_a_level_that_has_ended(f, p):
    kept = []
    grad(lambda x: kept.append(f({**p, "x": x})) or loss(kept[0]))(p["x"])
    return kept[0] + 1


def dual_that_outlives_its_level(f, p):
    with forward_ad.dual_level():
        y = f(dual(p, p))
    return y + 1


def backward_after_the_level(f, p):
    x = p["x"].clone().requires_grad_()
    with forward_ad.dual_level():
        y = f({**p, "x": x, "weights[1]": forward_ad.make_dual(p["weights[1]"], p["weights[1]"])})
        tangent = tangent_of(y)
    return torch.autograd.grad(loss(y) + loss(tangent), x)[0]


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize(
    "function",
    [
        weight_changed_in_grad,
        y_changed_in_grad,
        y_changed_in_jacobians,
        weight_changed_after_vmap,
        weight_changed_after_dual,
        output_of_a_level_that_has_ended,
        dual_that_outlives_its_level,
        backward_after_the_level,
    ],
)
def test_changes_and_lifetimes(backend, function, activation):
    """The same error or value as on the native path."""
    arguments = problem(activation)[:1]
    ours, native = (
        of_names(network, activation, len(SIZES) - 1) for network in (relu_mlp, native_mlp)
    )
    if outcome(function, native, *arguments) is RuntimeError:
        with pytest.raises(RuntimeError):
            function(ours, *arguments)
    else:
        compare(function, activation, arguments, 2)


# -- Modules -----------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x):
        return self.scale * self.net(self.scale * x)


def models(activation=None, wrap=True, recompute=False):
    """A model with a ReluMLP, and the same one with an nn.Sequential."""
    net, sequential = support.twins(
        3, [4, 4], 2, output_activation=activation, recompute=recompute, dtype=torch.float64
    )
    return tuple(
        Model(support.integers_(m)) if wrap else support.integers_(m) for m in (net, sequential)
    )


def of_parameters(model, x):
    """The loss as a function of the parameters."""
    return lambda p: loss(functional_call(model, p, (x,)))


MODULE_TRANSFORMS = {
    "value": lambda f, p, t: f(p),
    "grad": lambda f, p, t: grad(f)(p),
    "jvp": lambda f, p, t: jvp(f, (p,), (t,)),
    "forward over reverse": lambda f, p, t: fwd(grad(f), t)(p),
    "reverse over forward": lambda f, p, t: grad(fwd(f, t))(p),
    "forward over forward": lambda f, p, t: fwd(fwd(f, t), t)(p),
}


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("wrap", [False, True], ids=["ReluMLP", "model"])
@pytest.mark.parametrize("transform", MODULE_TRANSFORMS)
def test_functional_call(backend, transform, wrap, recompute):
    x = integers(5, 3)
    results = []
    for model in models("relu", wrap, recompute):
        lent = {name: (2 * p).detach() for name, p in model.named_parameters()}
        tangents = {name: p.roll(1) + 1 for name, p in lent.items()}
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        result = MODULE_TRANSFORMS[transform](of_parameters(model, x), lent, tangents)
        results.append(tree_flatten(result)[0])
        assert_same(dict(model.state_dict()), before)
        # No parameter of this call is kept for the next one.
        results[-1].append(model(x).detach())
    for ours, theirs in zip(*results, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("transform", MODULE_TRANSFORMS)
def test_hooks_under_a_transform(backend, transform):
    """With a hook the children run one by one, under a transform as elsewhere."""
    x, calls, results = integers(5, 3), [], []
    for model in models("relu", wrap=False):
        model[2].register_forward_hook(lambda module, inputs, y: calls.append(y.shape) or 3 * y)
        p = {name: parameter.detach() for name, parameter in model.named_parameters()}
        with support.count_calls() as counts:
            result = MODULE_TRANSFORMS[transform](of_parameters(model, x), p, p)
        assert counts["forward"] == counts["backward"] == 0
        results.append(tree_flatten(result)[0])
    assert calls == [(5, 4)] * 2
    for ours, theirs in zip(*results, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("inside", ["x", "biases[1]"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "forward over reverse"])
def test_gradients_outside_of_a_transform(backend, transform, inside):
    """Some tensors require gradients outside, and one is differentiated inside."""

    def mixed(f, p, t):
        p = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}

        def of_one(tensor):
            return loss(f({**p, inside: tensor}))

        x, v = p[inside].detach(), t[inside]
        result = {
            "grad": lambda: grad(of_one)(x),
            "jvp": lambda: jvp(of_one, (x,), (v,))[1],
            "forward over reverse": lambda: jvp(grad(of_one), (x,), (v,))[1],
        }[transform]()
        others = [tensor for name, tensor in p.items() if name != inside]
        grads = torch.autograd.grad(result.sum(), others, materialize_grads=True)
        return [result.detach(), *grads]

    for activation in ("relu", "tanh"):
        compare(mixed, activation, problem(activation)[:2], 3)


# -- What runs, and what is kept ---------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_create_graph_runs_one_pass_each_way(backend, recompute):
    """The first-order part of a gradient with a graph of its own."""
    net, _ = support.twins(3, [4, 4], 2, recompute=recompute, output_activation="tanh")
    with support.count_calls() as counts:
        y = net(torch.randn(5, 3))
        assert counts == {"forward": 1, "backward": 0, "loss_and_grads": 0, "native": 0}
        grads = torch.autograd.grad(y.sum(), list(net.parameters()), create_graph=True)
        # Recomputing the activations is one more pass, which autograd records.
        expected = {"forward": 1 + recompute, "backward": 1, "loss_and_grads": 0, "native": 0}
        assert counts == expected
    torch.autograd.grad(sum(grad.square().sum() for grad in grads), list(net.parameters()))


@pytest.mark.parametrize(
    "transform, forward, backward", [("grad", 1, 1), ("vjp", 1, 1), ("jvp", 1, 0)]
)
def test_transforms_run_fused(backend, transform, forward, backward):
    arguments = problem("tanh")
    function = of_names(relu_mlp, "tanh", len(SIZES) - 1)
    with support.count_calls() as counts:
        TRANSFORMS[transform][1](function, *arguments)
    assert (counts["forward"], counts["backward"]) == (forward, backward)
    if transform != "jvp":
        assert counts["native"] == 0


RELEASED = {
    "relu_mlp": lambda f, p, t: f(p),
    "gradient": lambda f, p, t: torch.autograd.grad(loss(f(p)), p["x"], create_graph=True)[0],
    "operator": lambda f, p, t: torch.ops.relu_mlp.relu_mlp(p["x"], [p["weights[0]"]], []),
    "grad": lambda f, p, t: grad(lambda x: loss(f({**p, "x": x})))(p["x"]),
    "jvp": lambda f, p, t: jvp(lambda x: f({**p, "x": x}), (p["x"].detach(),), (t["x"],))[1],
}


class Mark:
    pass


def mark_nodes(node):
    """Attaches an object to every node of a graph except the leaves. Returns references to them."""
    if node is None or hasattr(node, "variable") or "mark" in node.metadata:
        return []
    node.metadata["mark"] = mark = Mark()
    below = [mark_nodes(next_node) for next_node, _ in node.next_functions]
    return [weakref.ref(mark), *itertools.chain(*below)]


@pytest.mark.slow
@pytest.mark.parametrize("form", [*RELEASED, "dual"])
def test_graph_is_released(backend, form):
    """Without the garbage collector: no saved tensor refers to itself."""
    p, t, *_ = problem("tanh")
    p = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
    f = of_names(relu_mlp, "tanh", len(SIZES) - 1)
    gc.collect()
    gc.disable()
    try:
        if form == "dual":
            with forward_ad.dual_level():
                y = f(dual(p, t))
        else:
            y = RELEASED[form](f, p, t)
        references = [weakref.ref(y), *mark_nodes(y.grad_fn)]
        assert len(references) > 1
        del y
        assert [reference() for reference in references] == [None] * len(references)
    finally:
        gc.enable()


# -- torch.compile -----------------------------------------------------------------------

COMPILED = {
    "grad": lambda f, x, v: grad(lambda x: loss(f(x)))(x),
    "jvp": lambda f, x, v: jvp(f, (x,), (v,)),
    "jacrev": lambda f, x, v: jacrev(f)(x),
    "jacfwd": lambda f, x, v: jacfwd(f)(x),
    "hessian": lambda f, x, v: hessian(lambda x: loss(f(x)))(x),
}


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "backend, operator, transform",
    [
        # When compiled, the function runs the native layers on the reference.
        *[(name, "function", "jvp") for name in support.BACKENDS],
        *[(support.BACKENDS[0], "function", n) for n in COMPILED if n != "jvp"],
        *[(name, "relu_mlp", "jvp") for name in support.BACKENDS],
        *[(name, "forward", n) for name in support.BACKENDS for n in ("grad", "jvp")],
    ],
    indirect=["backend"],
)
def test_compiled(backend, transform, operator):
    weights, biases = integer_network([3, 4, 2], requires_grad=False)
    ours = {
        "function": lambda x: relu_mlp(x, weights, biases),
        "relu_mlp": lambda x: torch.ops.relu_mlp.relu_mlp(x, weights, biases),
        "forward": lambda x: torch.ops.relu_mlp.forward(x, weights, biases, "none", False)[0],
    }[operator]
    x, v = integers(2, 3), integers(2, 3)
    function = COMPILED[transform]
    compiled = torch.compile(lambda x, v: function(ours, x, v), backend="aot_eager", fullgraph=True)
    expected = function(lambda x: native_mlp(x, weights, biases), x, v)
    for n, pair in enumerate(zip(tree_flatten(compiled(x, v))[0], tree_flatten(expected)[0])):
        assert_same(*pair, f"result {n}")
