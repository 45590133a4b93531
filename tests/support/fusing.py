"""Checks that a model gives the same bits before `fuse`, after it and after `unfuse`.

For that, the Linears of a network get integers. The input of the network, and the gradient that
comes back to it, are rounded to binary fractions. Then its sums are exact in every order. The rest
of the model is the same code before and after.
"""

import copy
import io

import torch

from relu_mlp import fuse, unfuse

from .counting import count_calls
from .networks import integers_


class Round(torch.autograd.Function):
    """The identity, with values rounded to multiples of 1/4 and gradients to multiples of 2^-30."""

    @staticmethod
    def forward(ctx, x):
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, grad):
        return (2**30 * grad).round() / 2**30


def round_input(module, args):
    return Round.apply(*args)


def round_output(module, args, y):
    return Round.apply(y)


def make_exact(model, networks, before, after):
    """Makes sums exact in the networks of a model.

    Args:
        networks: modules that have Linears, and the names of these.
        before, after: the modules whose output is the input of a network, and the modules whose
            output's gradient comes back to it.
    """
    for module, *names in networks:
        for name in names:
            integers_(getattr(module, name))
    for module in {*before, *after}:
        module.register_forward_hook(round_output)
    return model


def run(model, *inputs, **arguments):
    """The output, and the gradients of the inputs and all parameters."""
    inputs = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    model.zero_grad()
    torch.manual_seed(3)  # for dropout
    y = model(*inputs, **arguments)
    y = getattr(y, "logits", y)
    y.backward((torch.arange(y.numel()) % 5 - 2).reshape(y.shape).to(y.dtype))
    return [y.detach(), *[x.grad for x in inputs], *[p.grad for p in model.parameters()]]


def same(actual, expected):
    pairs = list(zip(actual, expected, strict=True))
    return all(a is e is None or torch.equal(a, e) for a, e in pairs)


def fused_like(model, *inputs, runs, became, linears=2, copies=None, **arguments):
    """Fuses a model and unfuses it. Results stay the same, with `runs` operators each way.

    Args:
        became: the number of modules that are fused.
        linears: the number of Linears in every run.
        copies: ways to copy a model.
    """
    with count_calls() as before:
        expected = run(model, *inputs, **arguments)
    kinds = [type(m) for m in model.modules()]
    copies = copies or [copy.deepcopy, saved_and_loaded]
    # A decoder layer with a module as activation gets another attribute when it is copied.
    attributes = {how: attributes_of(how(model)) for how in copies}
    own_attributes = attributes_of(model)
    keys, parameters = list(model.state_dict()), list(model.parameters())

    report = fuse(model, report=True)

    assert report.model is model
    assert len(report.replaced) == became
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), kinds, strict=True))
    with count_calls() as after:
        actual = run(model, *inputs, **arguments)
    assert (after["forward"], after["backward"]) == (runs, runs)
    # each Linear makes at most three products, and at least the one of the forward pass
    assert linears * runs <= before["native"] - after["native"] <= 3 * linears * runs
    assert same(actual, expected)

    for how in copies:
        other = how(model)
        with count_calls() as calls:
            assert same(run(other, *inputs, **arguments), expected)
        assert calls == after
        unfuse(other)
        assert [type(m) for m in other.modules()] == kinds
        assert attributes_of(other) == attributes[how]
    assert unfuse(model) is model
    assert [type(m) for m in model.modules()] == kinds
    assert attributes_of(model) == own_attributes
    with count_calls() as calls:
        assert same(run(model, *inputs, **arguments), expected)
    assert calls == before
    return fuse(model)


def attributes_of(model):
    return [set(m.__dict__) for m in model.modules()]


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def compiled(model):
    """The model compiled, and the list of its graphs."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend=keep), graphs
