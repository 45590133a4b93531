"""A rule never changes a result, whatever a method does with the hidden values.

Every idiom runs natively and fused. Both must give the same outputs, of the same types, the same
gradients and exceptions, and leave the same state on the module. Integers make all sums exact, as
in test_fuse_models.py.
"""

import contextlib
import copy
import functools
import io
import linecache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import support
from relu_mlp import fuse, register_fusion

#: Nothing here depends on whether the native node records a graph.
backend = support.backend_fixture(support.BACKENDS)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Base(nn.Module):
    """Two Linears, and members that a method may use in some way."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 3)
        self.layers = nn.ModuleList([self.fc1, self.fc2])
        self.act, self.dropout = nn.ReLU(), nn.Dropout(0.5)
        self.p, self.seen, self.steps, self.text = 0.0, None, [], "relu"
        support.integers_(self)

    @property
    def noted(self):
        """fc2, and a record that it was accessed."""
        self.steps.append("noted")
        return self._modules["fc2"]

    @property
    def shaky(self):
        """fc2, and a different Linear the next time."""
        self.steps.append("shaky")
        return self._modules["fc2" if len(self.steps) == 1 else "fc3"]

    @property
    def counted(self):
        """The activation, with a count of its calls."""
        self.steps.append("counted")
        return self.act

    def double(self):
        self.fc2.weight.data.mul_(2)
        return 0

    def note(self, x):
        self.steps.append(x.sum().item())
        return x

    def forward(self, x):
        return 2 * x


def unknown_decorator(function):
    @functools.wraps(function)
    def method(self, x):
        self.seen = function.__code__.co_name  # reads the hidden values
        return function(self, x)

    return method


def plain_decorator(function):
    @functools.wraps(function)
    def method(*args, **kwargs):
        args[0].seen = function.__name__
        return function(*args, **kwargs)

    return method


def rewriting_decorator(function):
    @functools.wraps(function)
    def method(self, x):
        return functools.partial(function, self)(x)

    method.__wrapped__ = lambda self, x: x  # does not do what its name says
    return method


def self_aware_decorator(function):
    @functools.wraps(function)
    def method(self, x):
        self.seen = type(self).forward is method
        return function(self, x)

    return method


def renamed(function):
    function.__code__ = function.__code__.replace(co_name="renamed")
    return function


def renaming_decorator(function):
    """Renames its code, as the decorators of PyTorch 2.15 do."""
    return renamed(plain_decorator(function))


def apply(function, x):
    return function(x)


def looks(namespace):
    return namespace["h"].sum().item()


NAMES = {
    "Twice": Twice,
    "apply": apply,
    "checkpoint": checkpoint,
    "contextlib": contextlib,
    "functools": functools,
    "looks": looks,
    "relu": F.relu6,
    "cast": F.gelu,
    "plain_decorator": plain_decorator,
    "unknown_decorator": unknown_decorator,
    "rewriting_decorator": rewriting_decorator,
    "self_aware_decorator": self_aware_decorator,
    "renamed": renamed,
    "renaming_decorator": renaming_decorator,
}

#: The body of `forward`, and its number of operator calls; None if it is not fused.
IDIOMS = {
    # - the hidden values are passed on
    "returns them": ("h = F.relu(self.fc1(x))\nreturn self.fc2(h), h", None),
    "returns them, walrus": ("return self.fc2(h := F.relu(self.fc1(x))), h", None),
    "returns a dict": ("h = F.relu(self.fc1(x))\nreturn {'y': self.fc2(h), 'h': h}", None),
    "yields nothing else": ("h = F.relu(self.fc1(x))\ny = self.fc2(h)\nreturn y, h.shape", None),
    "keeps them": ("h = self.seen = F.relu(self.fc1(x))\nreturn self.fc2(h)", None),
    "keeps them later": ("h = F.relu(self.fc1(x))\ny = self.fc2(h)\nself.seen = h\nreturn y", None),
    "keeps them first": ("self.seen = F.relu(self.fc1(x))\nreturn self.fc2(self.seen)", None),
    "prints them": ("h = F.relu(self.fc1(x))\nprint(h)\nreturn self.fc2(h)", None),
    "prints them between": ("h = self.fc1(x)\nprint(h)\nh = F.relu(h)\nreturn self.fc2(h)", None),
    "asserts": ("h = F.relu(self.fc1(x))\nassert h.min() >= 0\nreturn self.fc2(h)", None),
    "used twice": ("h = F.relu(self.fc1(x))\nreturn self.fc2(h) + self.fc2(h)", None),
    "used before": ("h = F.relu(self.fc1(x))\nreturn h[..., :3] + self.fc2(h)", None),
    "used after": ("h = F.relu(self.fc1(x))\ny = self.fc2(h)\nreturn y * h.mean()", None),
    "another name": ("h = g = F.relu(self.fc1(x))\nreturn self.fc2(h) + g.sum()", None),
    "added to": ("h = F.relu(self.fc1(x))\nh += 1\nreturn self.fc2(h)", None),
    "added to by the result": (
        "h = F.relu(self.fc1(x))\nh = h[..., :3]\nh += self.fc2(F.pad(h, (0, 1)))\nreturn h",
        None,
    ),
    "deleted": ("h = F.relu(self.fc1(x))\ny = self.fc2(h)\ndel h\nreturn y", None),
    "locals": ("h = F.relu(self.fc1(x))\ny = self.fc2(h)\nreturn y, looks(locals())", None),
    "eval": ("h = F.relu(self.fc1(x))\ny = self.fc2(h)\nreturn y, eval('h.sum()')", None),
    "a closure": ("f = lambda: h\nh = F.relu(self.fc1(x))\ny = self.fc2(h)\nreturn y, f()", None),
    "a closure over x": ("f = lambda: x\nx = F.relu(self.fc1(x))\ny = self.fc2(x)\nreturn y, f()", None),
    "a global": ("global h\nh = F.relu(self.fc1(x))\nreturn self.fc2(h)", None),
    "a loop that reads them again": (
        "h = torch.zeros(4)\nfor _ in range(2):\n    x = x + h.sum()\n"
        "    h = F.relu(self.fc1(x))\n    y = self.fc2(h)\nreturn y",
        None,
    ),
    "a loop that starts from them": (
        "h = x\nfor _ in range(2):\n    h = F.relu(self.fc1(h[..., :3]))\n    y = self.fc2(h)\n"
        "return y",
        None,
    ),
    "an exception shows them": (
        "h = x\ntry:\n    h = F.relu(self.fc1(h))\n    h = self.fc2(h[..., :2])\n"
        "except RuntimeError:\n    return h\nreturn h",
        None,
    ),
    "an exception may show them": (
        "try:\n    h = F.relu(self.fc1(x))\n    y = self.fc2(h)\n    y.nothing()\n"
        "except AttributeError:\n    return h\nreturn y",
        None,
    ),
    "finally": (
        "try:\n    h = F.relu(self.fc1(x))\n    return self.fc2(h)\nfinally:\n    self.seen = h",
        None,
    ),
    "a with that swallows": (
        "h = x\nwith contextlib.suppress(AttributeError):\n    h = F.relu(self.fc1(x))\n"
        "    h = self.fc2(h)\n    h.nothing()\nreturn h",
        None,
    ),
    "a name of nothing": ("h = F.relu(self.fc1(x))\nreturn torch.stack([self.fc2(h)])", 1),
    # - something else happens in between
    "isinstance": (
        "return self.fc2(h) if isinstance(h := F.relu(self.fc1(x)), torch.Tensor) else x",
        None,
    ),
    "isinstance in a row": (
        "h = F.relu(self.fc1(x))\nif isinstance(h, nn.Module):\n    return x\nreturn self.fc2(h)",
        None,
    ),
    "autograd.Function": ("return self.fc2(Twice.apply(F.relu(self.fc1(x))))", None),
    "reentrant checkpoint of the first": (
        "return self.fc2(checkpoint(lambda z: F.relu(self.fc1(z)), x, use_reentrant=True))",
        None,
    ),
    "checkpoint of the first": (
        "return self.fc2(checkpoint(lambda z: F.relu(self.fc1(z)), x, use_reentrant=False))",
        None,
    ),
    "reentrant checkpoint": (
        "return checkpoint(lambda z: self.fc2(F.relu(self.fc1(z))), x, use_reentrant=True)",
        2,
    ),
    "checkpoint": (
        "return checkpoint(lambda z: self.fc2(F.relu(self.fc1(z))), x, use_reentrant=False)",
        2,
    ),
    "detach": ("h = F.relu(self.fc1(x)).detach()\nreturn self.fc2(h)", None),
    "detach in a row": ("h = F.relu(self.fc1(x))\nh = h.detach()\nreturn self.fc2(h)", None),
    "requires_grad_": ("h = self.fc1(x)\nh.retain_grad()\nreturn self.fc2(F.relu(h))", None),
    "hook on them": (
        "h = F.relu(self.fc1(x))\nh.register_hook(lambda g: 2 * g)\nreturn self.fc2(h)",
        None,
    ),
    "in place": ("h = self.fc1(x)\nF.relu_(h)\nreturn self.fc2(h)", None),
    "in place, method": ("h = self.fc1(x)\nh.relu_()\nreturn self.fc2(h)", None),
    "in place, a row": ("h = self.fc1(x)\nh = torch.relu_(h)\nh = self.fc2(h)\nreturn h", 1),
    "in place, argument": ("h = F.relu(self.fc1(x), True)\nreturn self.fc2(h)", 1),
    "no_grad": ("with torch.no_grad():\n    h = F.relu(self.fc1(x))\nreturn self.fc2(h)", None),
    "no_grad around all": (
        "with torch.no_grad():\n    y = self.fc2(F.relu(self.fc1(x)))\nreturn y + x",
        1,
    ),
    "no_grad around a row": (
        "with torch.no_grad():\n    h = F.relu(self.fc1(x))\n    y = self.fc2(h)\nreturn y + x",
        1,
    ),
    "autocast": (
        "with torch.autocast('cpu', torch.bfloat16):\n    h = F.relu(self.fc1(x))\n"
        "return self.fc2(h.float())",
        None,
    ),
    "parameters changed": (
        "h = F.relu(self.fc1(x))\nself.fc1.weight.data.add_(1)\nreturn self.fc2(h)",
        None,
    ),
    "the next parameters changed": (
        "h = F.relu(self.fc1(x))\nself.fc2.weight.data.add_(1)\nreturn self.fc2(h)",
        None,
    ),
    "parameters changed before": (
        "self.fc2.weight.data.add_(1)\nreturn self.fc2(F.relu(self.fc1(x)))",
        1,
    ),
    "x changed": ("h = F.relu(self.fc1(x))\nx += 1\nreturn self.fc2(h) + x", None),
    "x changed first": ("return self.fc2(F.relu(self.fc1(x.add_(1)))) + x", 1),
    "x changed before the result is added": (
        "h = F.relu(self.fc1(x))\nreturn x.add_(1) + self.fc2(h)",
        None,
    ),
    "x changed after": ("h = F.relu(self.fc1(x))\nreturn self.fc2(h) + x.mul(2)", 1),
    "an effect before": ("h = F.relu(self.fc1(x))\nreturn self.note(x) + self.fc2(h)", None),
    "an effect in the input": ("return self.fc2(F.relu(self.fc1(self.note(x))))", 1),
    "an effect after": ("h = F.relu(self.fc1(x))\nreturn self.fc2(h) + self.note(x)", 1),
    "an effect in a target": (
        "y = [x * 1]\nh = F.relu(self.fc1(x))\ny[self.double()] += self.fc2(h)\nreturn y[0]",
        None,
    ),
    "an effect in a target later": (
        "y = [x]\nh = F.relu(self.fc1(x))\ny[self.double()] = self.fc2(h)\nreturn y[0]",
        1,
    ),
    "a property between": ("return self.fc2(self.counted(self.fc1(x)))", None),
    "a property": ("return self.noted(F.relu(self.fc1(x)))", None),
    "a property in a row": ("h = F.relu(self.fc1(x))\nreturn self.shaky(h)", None),
    "a Linear replaced": (
        "h = F.relu(self.fc1(x))\nself.fc2 = nn.Identity()\nreturn self.fc2(h)",
        None,
    ),
    "a Linear replaced before": (
        "self.fc2 = nn.Linear(4, 3)\nsupport.integers_(self.fc2)\n"
        "return self.fc2(F.relu(self.fc1(x)))",
        1,
    ),
    # - other kinds of calls
    "a function named relu": ("return self.fc2(relu(self.fc1(x)))", None),
    "a function named cast": ("h = relu(self.fc1(x))\nh = cast(h)\nreturn self.fc2(h)", None),
    "a text": ("return self.fc2(self.text(self.fc1(x)))", None),
    "keywords": ("return self.fc2(input=F.relu(input=self.fc1(input=x)))", None),
    "call": ("return self.fc2.__call__(F.relu(self.fc1.__call__(x)))", None),
    "forward": ("return self.fc2.forward(F.relu(self.fc1.forward(x)))", None),
    "getattr": ("return getattr(self, 'fc2')(F.relu(getattr(self, 'fc1')(x)))", None),
    "star": ("return self.fc2(*[F.relu(*[self.fc1(x)])])", None),
    "partial": ("return self.fc2(functools.partial(F.relu, inplace=True)(self.fc1(x)))", None),
    "a function as argument": ("return apply(self.fc2, F.relu(apply(self.fc1, x)))", None),
    "ModuleList": ("for m in self.layers:\n    x = m(F.relu(x))\nreturn x", None),
    "ModuleList's items": ("return self.layers[1](F.relu(self.layers[0](x)))", None),
    "einsum": (
        "h = F.relu(self.fc1(x))\n"
        "return torch.einsum('...i,oi->...o', h, self.fc2.weight) + self.fc2.bias",
        None,
    ),
    "a local activation": ("act = F.relu\nreturn self.fc2(act(self.fc1(x)))", None),
    "a local F": ("import torch.nn.functional as F\nreturn self.fc2(F.relu(self.fc1(x)))", None),
    "a local self": ("self = self\nreturn self.fc2(F.relu(self.fc1(x)))", None),
    "another activation": ("return self.fc2(F.leaky_relu(self.fc1(x), 0.5))", None),
    "relu of another": ("return self.fc2(self.act(self.act(self.fc1(x))))", 0),
    "conditional": ("return self.fc2(F.relu(self.fc1(x))) if x.dim() > 1 else x", 1),
    "and": ("return x.dim() > 1 and self.fc2(F.relu(self.fc1(x)))", 1),
    "and, in a row": ("h = F.relu(self.fc1(x))\nreturn x.dim() > 5 and self.fc2(h)", None),
    "try": (
        "try:\n    return self.fc2(F.relu(self.fc1(x)))\nexcept RuntimeError:\n    return x",
        1,
    ),
    "raises": ("return self.fc2(F.relu(self.fc1(x[..., :2])))", 1),
    "raises inside": ("return self.fc1(F.relu(self.fc1(x)))", None),
    "comprehension": ("return [self.fc2(F.relu(self.fc1(row))) for row in x]", 2),
    "comprehension of one": ("h = F.relu(self.fc1(x))\nreturn [self.fc2(h) for _ in '1']", None),
    "generator expression": ("return sum(self.fc2(F.relu(self.fc1(row))) for row in x)", 2),
    "lambda": ("f = lambda z: self.fc2(F.relu(self.fc1(z)))\nreturn f(x) + f(-x)", 2),
    "match": ("match 1:\n    case 1:\n        x = self.fc2(F.relu(self.fc1(x)))\nreturn x", 1),
    "super": ("return super().forward(self.fc2(F.relu(self.fc1(x))))", 1),
    "the class": ("return self.fc2(F.relu(self.fc1(x))), self.__class__.__name__", None),
    "the type": ("return self.fc2(F.relu(self.fc1(x))), type(self).__name__", None),
    "two of them": ("h = self.fc2(F.relu(self.fc1(x)))\nreturn h, self.fc2(self.act(self.fc1(h)))", 2),
    "functional dropout": ("return self.fc2(F.dropout(F.relu(self.fc1(x)), self.p, self.training))", 1),
    "functional dropout, local p": ("p = 0.\nreturn self.fc2(F.dropout(F.relu(self.fc1(x)), p))", None),
    "functional dropout drops": ("return self.fc2(F.dropout(F.relu(self.fc1(x)), 0.5))", 0),
    "dropout drops": ("return self.fc2(self.dropout(F.relu(self.fc1(x))))", 0),
    "dropout of a bad p": ("return self.fc2(F.dropout(F.relu(self.fc1(x)), 1.5, False))", 0),
    "relu of a bad argument": ("return self.fc2(torch.relu(self.fc1(x), True))", 0),
    "async": ("return self.fc2(F.relu(self.fc1(x)))", None, "async "),
    "generator": ("yield self.fc2(F.relu(self.fc1(x)))", None),
    "torch.no_grad()": ("return self.fc2(F.relu(self.fc1(x)))", 1, "@torch.no_grad()"),
    "torch.jit.ignore": ("return self.fc2(F.relu(self.fc1(x)))", 1, "@torch.jit.ignore"),
    "plain decorator": ("return self.fc2(F.relu(self.fc1(x)))", 1, "@plain_decorator"),
    "unknown decorator": ("return self.fc2(F.relu(self.fc1(x)))", None, "@unknown_decorator"),
    "rewriting decorator": ("return self.fc2(F.relu(self.fc1(x)))", None, "@rewriting_decorator"),
    "self-aware decorator": ("return self.fc2(F.relu(self.fc1(x)))", None, "@self_aware_decorator"),
    "renamed": ("return self.fc2(F.relu(self.fc1(x)))", 1, "@renamed"),
    "renaming decorator": ("return self.fc2(F.relu(self.fc1(x)))", 1, "@renaming_decorator"),
    "lru_cache": ("return self.fc2(F.relu(self.fc1(x)))", None, "@functools.lru_cache"),
    "staticmethod": ("return 2 * x", None, "@staticmethod"),
}  # fmt: skip
# ruff: noqa: E501


def parts_of(value):
    """The values that a method returned or left behind, in comparable pieces."""
    if isinstance(value, torch.Tensor):
        return [type(value), value.dtype, value.requires_grad, value.detach().clone()]
    if isinstance(value, (tuple, list)):
        return [type(value), *(part for item in value for part in parts_of(item))]
    if isinstance(value, dict):
        return [type(value), *value, *parts_of(list(value.values()))]
    return [value]


def outcome(model):
    """Everything that a call does."""
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (2, 3)).float()
    leaf = x.clone().requires_grad_()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            y = model(leaf * 1)
            if hasattr(y, "send") and hasattr(y, "close"):  # a generator, or a coroutine
                try:
                    y = y.send(None)
                except StopIteration as stop:
                    y = stop.value
        tensors = [y for y in torch.utils._pytree.tree_leaves(y) if isinstance(y, torch.Tensor)]
        total = sum(part.float().sum() for part in tensors if part.requires_grad)
        if isinstance(total, torch.Tensor):
            total.backward()
    except Exception as error:
        return [type(error)]
    grads = [tensor.grad for tensor in (leaf, *model.parameters())]
    left = [model.seen, model.steps, sorted(model.__dict__), list(model.state_dict().values())]
    return [printed.getvalue(), *parts_of(y), *parts_of(grads), *parts_of(left)]


def same(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("idiom", IDIOMS)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_idiom(backend, idiom):
    body, runs, *before = IDIOMS[idiom]
    is_async = before == ["async "]
    kind = support.class_from_source(
        Base,
        body,
        arguments="x" if before == ["@staticmethod"] else "self, x",
        before="" if is_async or not before else before[0],
        is_async=is_async,
        support=support,
        **NAMES,
    )
    names = ["fc1", "noted" if "noted" in body else "shaky" if "shaky" in body else "fc2"]
    register_fusion(kind, names)
    native = kind()
    fused = copy.deepcopy(native)
    report = fuse(fused, report=True)
    assert bool(report.replaced) == (runs is not None), report.left
    expected = outcome(native)
    with support.count_calls() as calls:
        actual = outcome(fused)
    assert calls["forward"] == (runs or 0)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert same(a, e)


def test_a_source_that_is_another_now():
    kind = support.class_from_source(Base, "return self.fc2(F.relu(self.fc1(x))) + 1")
    register_fusion(kind, ["fc1", "fc2"])
    name = kind.forward.__code__.co_filename
    size, time, lines, path = linecache.cache[name]
    linecache.cache[name] = (size, time, [line.replace(" + 1", " + 2") for line in lines], path)
    (entry,) = (entry for entry in fuse(kind(), report=True).left if not entry.name)
    assert entry.reason == "the source of its forward is not at hand"
    linecache.cache[name] = (size, time, lines, path)
    assert not fuse(kind(), report=True).replaced  # the source is read once per method


def test_a_method_of_tensors_that_somebody_patched(backend, monkeypatch):
    model = module_of("return self.fc2(self.fc1(x).relu())")
    monkeypatch.setattr(torch.Tensor, "relu", lambda self: 2 * F.relu(self))
    x = torch.randint(-2, 3, (2, 3)).float()
    expected = model(x)
    assert torch.equal(fuse(model)(x), expected)


@pytest.mark.parametrize(
    ("body", "before", "reason"),
    [
        ("return type(self)", "", "its forward asks for the class of its object"),
        ("self = self", "", "its forward may rebind the name of its object"),
        ("return x", "@functools.lru_cache", "its forward is not a plain function"),
        ("return x", "@unknown_decorator", "its forward has a decorator that may do anything"),
        ("return x", "@self_aware_decorator", "its forward computes no self.fc2(relu(self.fc1"),
    ],
)
def test_reasons(body, before, reason):
    kind = support.class_from_source(Base, body, before=before, **NAMES)
    register_fusion(kind, ["fc1", "fc2"])
    (entry,) = (entry for entry in fuse(kind(), report=True).left if not entry.name)
    assert entry.reason.startswith(reason)


def test_no_source():
    namespace = {"Base": Base, "F": F, "__name__": __name__}
    code = "class Mine(Base):\n    def forward(self, x): return self.fc2(F.relu(self.fc1(x)))"
    exec(compile(code, "nowhere.py", "exec"), namespace)
    register_fusion(namespace["Mine"], ["fc1", "fc2"])
    (entry,) = (entry for entry in fuse(namespace["Mine"](), report=True).left if not entry.name)
    assert entry.reason == "the source of its forward is not at hand"


def test_linears_in_another_order():
    body = "return self.fc2(F.relu(self.fc3(F.relu(self.fc1(x)))))"
    kind = support.class_from_source(Base, body)
    register_fusion(kind, ["fc1", "fc2", "fc3"])
    model = kind()
    model.fc3 = nn.Linear(4, 4)
    assert not fuse(model, report=True).replaced


def module_of(body):
    kind = support.class_from_source(Base, body, **NAMES)
    register_fusion(kind, ["fc1", "fc2"])
    return kind()


def change_activation(module):
    module.act = nn.GELU()


def change_dropout(module):
    module.dropout = nn.Dropout(0.5)


def hook_that_replaces(module):
    """The hook of the first Linear replaces the second."""

    def hook(linear, args, y):
        module.fc2 = nn.Linear(4, 3)
        support.integers_(module.fc2)

    module.fc1.register_forward_hook(hook)


def hook_that_activates(module):
    module.fc1.register_forward_hook(lambda m, a, y: setattr(module, "act", nn.Hardtanh()))


def method_of_the_class(module):
    original = getattr(type(module), "_relu_mlp_original", type(module))
    original.forward = lambda self, x: self.fc1(x) + 1


class ReLU6:
    relu = staticmethod(F.relu6)


def relu_of_the_module(module):
    original = getattr(type(module), "_relu_mlp_original", type(module))
    original.forward.__globals__["F"] = ReLU6


ROWS = {
    "one": "return self.fc2(self.dropout(self.act(self.fc1(x))))",
    "a row": "h = self.act(self.fc1(x))\nh = self.dropout(h)\nreturn self.fc2(h)",
    "F": "h = self.fc1(x)\nh = self.dropout(F.relu(h))\nreturn self.fc2(h)",
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(
    "change",
    [
        change_activation,
        change_dropout,
        hook_that_replaces,
        hook_that_activates,
        method_of_the_class,
        relu_of_the_module,
        lambda m: m.register_forward_hook(lambda m, a, y: 2 * y),
        lambda m: setattr(m.fc1, "bias", None),
        lambda m: setattr(m, "fc1", nn.utils.parametrizations.weight_norm(m.fc1)),
        lambda m: setattr(m, "forward", lambda x: 3 * x),
        lambda m: m.double(),
    ],
)
def test_what_changes_after_fuse(backend, row, change):
    outcomes = []
    for is_fused in (False, True):
        torch.manual_seed(1)
        model = module_of(ROWS[row]).eval()
        if is_fused:
            assert fuse(model, report=True).replaced
        change(model)
        outcomes.append(outcome(model))
    assert all(map(same, *outcomes))
