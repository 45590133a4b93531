"""`fuse` on realistic models: transformers, and users' own modules.

Fused and unfused must agree to the last bit. For that, the Linears of a network get integers. The
input of the network, and the gradient that comes back to it, are rounded to binary fractions. Then
all sums in the network are exact in every order. The rest of the model is the same code before and
after.
"""

import copy
import pickle
import textwrap
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import support
from relu_mlp import FusedSequential, fuse, register_fusion, unfuse
from relu_mlp.fusion import rules
from support.fusing import compiled, fused_like, make_exact, run, same

#: Nothing here depends on whether the native node records a graph.
backend = support.backend_fixture(support.BACKENDS)

# -- nn.Transformer -------------------------------------------------------------------------


def exact_layers(model):
    """Makes sums exact in all layers of a transformer."""
    networks, before, after = [], [], []
    for layer in model.modules():
        is_encoder = isinstance(layer, nn.TransformerEncoderLayer)
        if is_encoder or isinstance(layer, nn.TransformerDecoderLayer):
            networks.append((layer, "linear1", "linear2"))
            norms = [layer.norm1, layer.norm2] + ([] if is_encoder else [layer.norm3])
            before.append(norms[-1] if layer.norm_first else norms[-2])
            after.append(layer.dropout2 if is_encoder else layer.dropout3)
    return make_exact(model, networks, before, after)


def layer(kind, dropout=0.0, **arguments):
    return kind(8, 2, 16, dropout, dtype=torch.float64, **arguments)


def sequences(kind):
    """The inputs of a layer or of a stack of layers."""
    torch.manual_seed(2)
    count = 1 if kind in (nn.TransformerEncoderLayer, nn.TransformerEncoder) else 2
    return torch.randn(count, 3, 5, 8, dtype=torch.float64)


LAYERS = [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"norm_first": True, "batch_first": True},
        {"activation": F.relu, "bias": False},
        {"activation": nn.ReLU(), "batch_first": True},
        {"activation": nn.ReLU(inplace=True), "norm_first": True},
        {"activation": torch.relu},
    ],
    ids=lambda arguments: ",".join(arguments),
)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_transformer_layer(backend, kind, arguments):
    model = exact_layers(layer(kind, **arguments))
    fused_like(model, *sequences(kind), runs=1, became=1)


def stack(kind, dropout=0.0, **arguments):
    if kind is nn.Transformer:
        return nn.Transformer(8, 2, 2, 1, 16, dropout, dtype=torch.float64, **arguments)
    one = layer(kind, dropout, **arguments)
    if kind is nn.TransformerDecoderLayer:
        return nn.TransformerDecoder(one, 2, nn.LayerNorm(8, dtype=torch.float64))
    return nn.TransformerEncoder(one, 2, nn.LayerNorm(8, dtype=torch.float64))


@pytest.mark.parametrize(("kind", "runs"), [*((kind, 2) for kind in LAYERS), (nn.Transformer, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_a_transformer(backend, kind, runs, training):
    # in eval mode with dropouts, which do nothing then
    model = stack(kind, 0.0 if training else 0.5, batch_first=True).train(training)
    fused_like(exact_layers(model), *sequences(kind), runs=runs, became=runs)


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_in_training_drops_the_same(backend, kind):
    model = layer(kind, dropout=0.5)
    inputs = sequences(kind)
    expected = run(model, *inputs)
    (entry,) = fuse(model, report=True).replaced
    assert entry.note.endswith("native in training, because a Dropout has p = 0.5")
    with support.count_calls() as calls:
        actual = run(model, *inputs)
    assert calls["forward"] == calls["backward"] == 0
    assert same(actual, expected)


class FastPaths(TorchDispatchMode):
    """Counts the calls of PyTorch's fused inference of a whole layer."""

    understands_relu_mlp = True
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name == "aten::_transformer_encoder_layer_fwd"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "activation", ["relu", F.relu, nn.ReLU()], ids=["text", "function", "ReLU"]
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fast_path_of_inference_is_kept(backend, padded, activation):
    model = stack(nn.TransformerEncoderLayer, 0.5, batch_first=True, activation=activation).eval()
    (x,) = sequences(nn.TransformerEncoderLayer)
    # With a mask, the layers get a nested tensor, which only the fast path supports.
    mask = torch.arange(5) >= torch.tensor([[5], [3], [2]]) if padded else None
    outputs = []
    for _ in range(2):
        with torch.no_grad(), FastPaths() as fast, support.count_calls() as calls:
            outputs.append(model(x, src_key_padding_mask=mask))
        assert fast.count == 2
        assert calls["forward"] == 0
        fuse(model)
    assert torch.equal(*outputs)
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FastPaths() as fast, support.count_calls() as calls:
            model(x, src_key_padding_mask=mask)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    assert (fast.count, calls["forward"]) == (0, 2)


# -- A person's own modules --------------------------------------------------------------


class Own(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.act, self.dropout = nn.ReLU(), nn.Dropout(p)
        self.calls = 0
        support.integers_(self)


def own(body, *linears, p=0.0):
    """A module of a new class, with a rule, whose forward has this body."""
    kind = support.class_from_source(Own, "self.calls += 1\n" + textwrap.dedent(body))
    register_fusion(kind, linears or ["fc1", "fc2"], activation="act", dropout="dropout")
    return kind(p)


def integer_input(*shape):
    torch.manual_seed(2)
    return torch.randint(-2, 3, shape).float()


#: Bodies that compute a network in different ways, and the number of networks.
NETWORKS = {
    "modules": ("return self.fc2(self.dropout(self.act(self.fc1(x))))", 1),
    "F.relu": ("return self.fc2(F.relu(self.fc1(x)))", 1),
    "torch.relu": ("return self.fc2(torch.relu(self.fc1(x)))", 1),
    "by its path": ("return self.fc2(torch.nn.functional.relu(self.fc1(x)))", 1),
    "method": ("return self.fc2(self.fc1(x).relu())", 1),
    "in place": ("return self.fc2(F.relu(self.fc1(x), inplace=True))", 1),
    "method in place": ("return self.fc2(self.fc1(x).relu_())", 1),
    "F.dropout of 0": ("return self.fc2(F.dropout(self.act(self.fc1(x)), 0.0))", 1),
    "F.dropout in eval": (
        "return self.fc2(F.dropout(self.act(self.fc1(x)), p=0.5, training=False))",
        1,
    ),
    "F.dropout as the module": (
        "return self.fc2(F.dropout(self.act(self.fc1(x)), self.dropout.p, self.training))",
        1,
    ),
    "parameters": ("return self.fc2(self.act(self.fc1(x))) + self.fc1.weight.sum()", 1),
    "twice": ("return self.fc2(self.act(self.fc1(x))) + self.fc2(self.act(self.fc1(-x)))", 2),
    "residual": ("return x + 2 * self.act(self.fc3(F.relu(self.fc1(x))))", 1),
    "a row": (
        """
        x = self.fc1(x)
        x = self.act(x)
        x = self.dropout(x)
        x = self.fc2(x)
        return x
        """,
        1,
    ),
    "a row of two": (
        """
        h = F.relu(self.fc1(x * 2))
        return x + self.fc3(self.dropout(h))
        """,
        1,
    ),
    "a row in other names": (
        """
        x = x + 1
        z: torch.Tensor = self.fc1(x.clone())
        h = torch.relu(z)
        x += self.fc3(h)
        return x
        """,
        1,
    ),
    "a row after another": (
        """
        h = self.fc1(x)
        h = x + self.fc3(F.relu(h))
        x = self.fc1(h).relu()
        return h + self.fc3(x)
        """,
        2,
    ),
    "a row in a branch": (
        """
        if x.dim() > 1:
            h = self.fc1(x)
            h = self.fc2(F.relu(h))
        else:
            h = x
        return h
        """,
        1,
    ),
    "a row in a loop": (
        """
        for _ in range(2):
            h = self.act(self.fc1(x))
            x = self.fc3(h)
        return x
        """,
        2,
    ),
    "in a function": (
        """
        def network(x):
            return self.fc2(self.act(self.fc1(x)))
        return torch.cat([network(part) for part in x.split(1)])
        """,
        2,
    ),
}


@pytest.mark.parametrize("words", NETWORKS)
def test_a_rule_for_an_own_module(backend, words):
    body, runs = NETWORKS[words]
    model = own(body, "fc1", "fc3" if "fc3" in body else "fc2")
    became = fused_like(
        nn.Sequential(nn.Hardtanh(-2, 2), model),
        integer_input(2, 3),
        runs=runs,
        became=1,
        copies=[copy.deepcopy],
    )
    assert type(became[1]).__name__ == "FusedOwn"
    assert model.calls == 3  # as often as it was called: an attribute can be set


#: Bodies that use the first Linear's result in another way, and the number of networks.
OTHERS = {
    "no activation": ("return self.fc2(self.fc1(x))", None),
    "GELU": ("return self.fc2(F.gelu(self.fc1(x)))", None),
    "squared": ("return self.fc2(self.act(self.fc1(x)) ** 2)", None),
    "scaled": ("return self.fc2(2 * self.act(self.fc1(x)))", None),
    "shifted": ("return self.fc2(self.act(1 - self.fc1(x)))", None),
    "another Linear": ("return self.fc3(self.act(self.fc1(x)))", None),
    "one between": ("return self.fc2(self.act(self.fc2(self.act(self.fc1(x)))))", 1),
    "relu twice": ("return self.fc2(self.act(self.act(self.fc1(x))))", 0),
    "none before": ("return self.fc2(F.pad(x, (1, 1)))", None),
    "only the first": ("return self.fc1(x)", None),
    "only the first, activated": ("return self.act(self.fc1(x))", None),
    "concatenated": ("return self.fc2(torch.cat([self.fc1(x)[..., 2:], x[..., :2]], -1))", None),
    "matmul": ("return self.act(self.fc1(x)) @ self.fc2.weight", None),
    "where": ("return self.fc2((h := self.fc1(x)).where(h > 1, h.new_zeros(())))", None),
    "detached": ("return self.fc2(self.act(self.fc1(x)).detach())", None),
    "shape": ("return self.fc2(self.act(h := self.fc1(x))) * (h.shape[-1] + len(h))", None),
    "keyword": ("return self.fc2(input=self.act(self.fc1(input=x)))", None),
    "dropout": ("return self.fc2(F.dropout(self.act(self.fc1(x)), 0.5))", 0),
    "no_grad": (
        """
        with torch.no_grad():
            h = self.act(self.fc1(x))
        return self.fc2(h)
        """,
        None,
    ),
    "no_grad later": (
        """
        h = self.act(self.fc1(x))
        with torch.no_grad():
            y = self.fc2(h)
        return y + h
        """,
        None,
    ),
    "autocast": (
        """
        h = self.act(self.fc1(x))
        with torch.autocast("cpu", torch.bfloat16):
            return self.fc2(h)
        """,
        None,
    ),
    "autocast elsewhere": (
        """
        h = self.fc1(x)
        with torch.autocast("cpu", torch.bfloat16):
            scaled = h * 2
        return self.fc2(scaled)
        """,
        None,
    ),
    "dropout in place": (
        """
        h = self.fc1(x)
        F.dropout(h, 0.5, inplace=True)
        return self.fc2(self.act(h))
        """,
        None,
    ),
    "relu in place": (
        """
        h = self.fc1(x)
        torch.relu_(h)
        return self.fc2(h)
        """,
        None,
    ),
    "set item": (
        """
        h = self.fc1(x)
        h[..., 0] = 1
        return self.fc2(self.act(h))
        """,
        None,
    ),
    "add in place": (
        """
        h = other = self.fc1(x)
        h += 1
        return self.fc2(self.act(other))
        """,
        None,
    ),
    "and a step aside": (
        """
        h = F.relu(self.fc1(x))
        return self.fc2(h) + h.sum(-1, keepdim=True)
        """,
        None,
    ),
}


def run_some(model, x):
    """`run`, where some parameters may get no gradient, or the result needs none."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(3)
    y = model(x)
    y.backward(torch.ones_like(y))
    return [y.detach(), x.grad, *[p.grad for p in model.parameters()]]


@pytest.mark.parametrize("words", OTHERS)
def test_a_module_that_is_not_a_network_stays_right(backend, words):
    body, runs = OTHERS[words]
    model = own(body)
    expected = run_some(model, integer_input(2, 3))
    assert bool(fuse(model, report=True).replaced) == (runs is not None)
    with support.count_calls() as calls:
        actual = run_some(model, integer_input(2, 3))
    assert calls["forward"] == (runs or 0)
    assert all(
        (a is None) == (e is None) and (a is None or (torch.equal(a, e) and a.dtype == e.dtype))
        for a, e in zip(actual, expected, strict=True)
    )


def test_three_linears(backend):
    body = """
        x = F.relu(self.fc1(x))
        x = self.dropout(F.relu(self.fc2(x)))
        return self.fc3(x)
    """
    model = own(body, "fc1", "fc2", "fc3")
    fused_like(
        nn.Sequential(model),
        integer_input(2, 3),
        runs=1,
        became=1,
        linears=3,
        copies=[copy.deepcopy],
    )


def test_a_rule_for_a_method(backend):
    class Block(Own):
        def forward(self, x):
            return self.feed_forward(x, scale=2) + self.fc3(self.fc1(x))

        def feed_forward(self, x, *, scale):
            return scale * self.fc3(F.relu(self.fc1(x)))

    register_fusion(Block, ["fc1", "fc3"], method="feed_forward")
    model = Block()
    expected = run_some(model, integer_input(2, 3))
    with support.count_calls() as calls:
        actual = run_some(fuse(model), integer_input(2, 3))
    assert calls["forward"] == calls["backward"] == 1
    assert same(actual[:4], expected[:4])


def doubled(module, args, y):
    assert type(args[0]) is type(y) is torch.Tensor
    return 2 * y


CHANGES = {
    "hook": lambda m: m.fc2.register_forward_hook(lambda m, args, y: 2 * y),
    "hook on the activation": lambda m: m.act.register_forward_hook(doubled),
    "hook on the dropout": lambda m: m.dropout.register_forward_hook(doubled),
    "activation": lambda m: setattr(m, "act", nn.GELU()),
    "function": lambda m: setattr(m, "act", None) or setattr(m, "act", nn.Hardtanh()),
    "dropout": lambda m: setattr(m, "dropout", nn.AlphaDropout(0.5)),
    "dropout's p": lambda m: setattr(m.dropout, "p", 0.5),
    "Linear": lambda m: setattr(m, "fc1", nn.Sequential(nn.Linear(3, 5))),
    "parametrized": lambda m: nn.utils.parametrizations.weight_norm(m.fc1),
    "pruned": lambda m: prune.l1_unstructured(m.fc2, "weight", 3),
    "forward": lambda m: setattr(m, "forward", lambda x: m.fc3(m.fc1(x))),
    "forward of a Linear": lambda m: setattr(m.fc2, "forward", lambda x: 3 * x),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_before_and_after_fuse(backend, change):
    def make():
        model = own(NETWORKS["modules"][0])
        torch.manual_seed(0)
        return model

    models = native, after, before = [make() for _ in range(3)]
    fuse(after)
    for model in models:
        torch.manual_seed(0)
        CHANGES[change](model)
    report = fuse(before, report=True)
    if change == "dropout's p":
        assert report.replaced and not report.left
    else:
        assert not report.replaced and report.left[0].name == ""
    expected = run_some(native, integer_input(2, 3))
    for model in (after, before):
        with support.count_calls() as calls:
            actual = run_some(model, integer_input(2, 3))
        assert calls["forward"] == 0
        assert same(actual, expected)


class MyLinear(nn.Linear):
    pass


def test_global_hooks_see_tensors(backend):
    model = fuse(own(NETWORKS["modules"][0]))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, y: seen.append((m, type(args[0])))
    )
    try:
        model(integer_input(2, 3))
    finally:
        handle.remove()
    modules = [model.fc1, model.act, model.dropout, model.fc2, model]
    assert seen == [(m, torch.Tensor) for m in modules]


def test_reasons():
    def left(change):
        model = own("return x")
        change(model)
        (entry,) = fuse(model, report=True).left
        return entry.reason

    assert left(lambda m: m.fc1.register_forward_pre_hook(print)) == "its fc1 carries a hook"
    assert left(lambda m: setattr(m, "act", nn.GELU())) == "its act is GELU"
    assert left(lambda m: m.__delattr__("fc2")) == "its fc2 is not a Linear but None"
    not_dropout = "its dropout is not a Dropout but ReLU"
    assert left(lambda m: setattr(m, "dropout", nn.ReLU())) == not_dropout
    assert left(lambda m: setattr(m, "forward", print)) == "has a forward of its own"
    assert left(lambda m: setattr(m, "fc1", MyLinear(3, 5))) == "its fc1 is a subclass of Linear"
    assert left(lambda m: setattr(m, "fc2", nn.ReLU())) == "its fc2 is not a Linear but ReLU"

    class Missing(Own):
        pass

    path = f"{Missing.__module__}.{Missing.__qualname__}"
    register_fusion(path, ["fc1", "fc2"], method="missing")
    (entry,) = fuse(Missing(), report=True).left
    assert entry.reason == "has no method missing, which its rule names"


class Stubborn(Own):
    """Rejects new attributes, like classes that check each assignment."""

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))

    def __setattr__(self, name, value):
        if name == "__class__":
            raise AttributeError(name)
        super().__setattr__(name, value)


class Slotted(Own):
    __slots__ = ("slot",)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


class Childless(Own):
    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))

    def __init_subclass__(cls, *, needed):
        pass


class Disguised(Own):
    __class__ = property(lambda self: Own)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


class Lookups(Own):
    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))

    def __getattr__(self, name):
        return super().__getattr__(name)


REASONS = {
    Stubborn: None,
    Slotted: None,
    Childless: "its class can't have a subclass: ",
    Disguised: "its class can't be changed: ",
    Lookups: "its class looks up attributes in a way of its own",
}


@pytest.mark.parametrize("kind", REASONS)
def test_classes_that_are_hard_to_change(backend, kind):
    register_fusion(kind, ["fc1", "fc2"])
    model = nn.Sequential(kind(), nn.Hardtanh(-2, 2), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 3))
    x = integer_input(2, 3)
    support.integers_(model)
    expected = run_some(model, x)
    report = fuse(model, report=True)
    reason = REASONS[kind]
    assert [entry.name for entry in report.replaced] == ["", "0"][: 1 + (reason is None)]
    assert [entry.name for entry in report.left] == ["0"][: reason is not None]
    if reason is not None:
        assert report.left[0].reason.startswith(reason)
    with support.count_calls() as calls:
        actual = run_some(model, x)
    assert calls["forward"] == calls["backward"] == 1 + (reason is None)
    assert same(actual, expected)
    unfuse(model)
    assert type(model[0]) is kind


@pytest.mark.parametrize("kind", LAYERS)
def test_a_subclass_has_no_rule(kind):
    class Mine(kind):
        pass

    model = Mine(8, 2, 16)
    report = fuse(model, report=True)
    assert type(model) is Mine
    assert report.left[0] == (
        "",
        "Mine",
        f"is a subclass of {kind.__name__}: see register_fusion",
    )


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickle(protocol):
    model = fuse(layer(nn.TransformerEncoderLayer))
    loaded = pickle.loads(pickle.dumps(model, protocol))
    assert type(loaded) is type(model)
    assert type(unfuse(loaded)) is nn.TransformerEncoderLayer
    assert same(loaded.state_dict().values(), model.state_dict().values())


def test_a_pickle_where_there_is_no_such_rule(monkeypatch):
    model = fuse(layer(nn.TransformerEncoderLayer))
    data = pickle.dumps(model)
    monkeypatch.setattr(rules, "_rules", {})
    assert type(pickle.loads(data)) is nn.TransformerEncoderLayer


def test_a_rule_by_path_and_a_new_rule():
    class Mine(Own):
        def forward(self, x):
            return self.fc2(F.relu(self.fc1(x)))

    register_fusion(f"{Mine.__module__}.{Mine.__qualname__}", ["fc1", "fc3"])
    (entry,) = fuse(Mine(), report=True).left
    reason = "its forward computes no self.fc3(relu(self.fc1(...))) that hides its values"
    assert entry.reason.startswith(reason)
    register_fusion(f"{Mine.__module__}.{Mine.__qualname__}", ["fc1", "fc2"])
    (entry,) = fuse(Mine(), report=True).replaced
    assert entry.note == "fc1, fc2 as one operator"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Linear(3, 3), ["a", "b"]), TypeError, "module_class must be a subclass of nn.Module"),
        ((dict, ["a", "b"]), TypeError, "module_class must be a subclass of nn.Module"),
        ((Own, "fc1"), TypeError, "linears must be a sequence of names, got 'fc1'"),
        ((Own, 3), TypeError, "linears must be a sequence of names, got 3"),
        ((Own, ["fc1", 2]), TypeError, r"linears\[1\] must be a name as text, got 2"),
        ((Own, ["fc1"]), ValueError, r"linears must be two or more different names, got \['fc1'\]"),
        ((Own, ["fc1", "fc1"]), ValueError, "linears must be two or more different names"),
    ],
)
def test_bad_arguments(arguments, error, message):
    before = dict(rules._rules)
    with pytest.raises(error, match=message):
        register_fusion(*arguments)
    assert rules._rules == before


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"activation": F.relu}, TypeError),
        ({"dropout": 0.1}, TypeError),
        ({"method": 3}, TypeError),
        ({"method": "missing"}, ValueError),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value.__name__,
)
def test_bad_names(arguments, error):
    (name,) = arguments
    with pytest.raises(error, match=f"{name} must "):
        register_fusion(Own, ["fc1", "fc2"], **arguments)


# -- Where the native layers serve ----------------------------------------------------------


def jvp(model, x):
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]


TRANSFORMED = {
    "inference mode": (lambda model, x: torch.inference_mode()(model)(x), 1),
    "functional_call": (
        lambda model, x: torch.func.functional_call(
            model, {name: 2 * p.detach() for name, p in model.named_parameters()}, (x,)
        ),
        1,
    ),
    "recomputed": (
        lambda model, x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False),
        1,
    ),
    "vmap": (lambda model, x: torch.func.vmap(model)(x), 0),
    "jvp": (jvp, 0),
    "autocast": (lambda model, x: torch.autocast("cpu", torch.bfloat16)(model)(x), 1),
}


@pytest.mark.parametrize("how", TRANSFORMED)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_under_a_transform(backend, how):
    call, runs = TRANSFORMED[how]
    outputs = []
    for patch in (unfuse, fuse):
        model = patch(own(NETWORKS["modules"][0]))
        with support.count_calls() as calls:
            outputs.append(call(model, integer_input(4, 3)))
    if how not in ("vmap", "jvp"):  # which may be fused in the future
        assert calls["forward"] == runs
    assert torch.equal(*outputs)
    assert outputs[0].dtype == outputs[1].dtype


def test_torchscript_runs_the_native_layers(backend):
    x = integer_input(4, 3)
    longer = support.integers_(
        nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Dropout(0.0), nn.Linear(5, 2))
    )
    scripted = [longer, exact_layers(layer(nn.TransformerEncoderLayer))]
    inputs = [x, sequences(nn.TransformerEncoderLayer)[0]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        for model, x in zip(scripted, inputs):
            without_hooks = copy.deepcopy(model)  # the hooks that make sums exact
            without_hooks.apply(lambda m: m._forward_hooks.clear())
            exact, expected = model(x), without_hooks(x)
            assert torch.equal(torch.jit.trace(fuse(model), (x,))(x), exact)
            with support.count_calls() as calls:
                assert torch.equal(torch.jit.script(fuse(without_hooks))(x), expected)
            assert calls["forward"] == 0


def test_super(backend):
    class Base(Own):
        def forward(self, x):
            return 2 * x

    class Mine(Base):
        def forward(self, x):
            return super().forward(self.fc2(F.relu(self.fc1(x))))

    register_fusion(Mine, ["fc1", "fc2"])
    model = Mine()
    expected = run_some(model, integer_input(2, 3))
    with support.count_calls() as calls:
        actual = run_some(fuse(model), integer_input(2, 3))
    assert calls["forward"] == calls["backward"] == 1
    assert same(actual[:-2], expected[:-2])


# -- torch.compile --------------------------------------------------------------------------


COMPILED = {
    "Sequential": lambda: nn.Sequential(
        nn.Linear(8, 5), nn.ReLU(), nn.Dropout(0.0), nn.Linear(5, 3), nn.LayerNorm(3)
    ),
    "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0),
    "own": lambda: own("return self.fc2(F.relu(self.fc1(x[..., :3])))"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_torch_compile(backend, name):
    model, x = fuse(COMPILED[name]()), torch.randn(2, 4, 8)
    function, graphs = compiled(model)
    assert torch.equal(function(x), model(x))
    (graph,) = graphs
    operators = [node for node in graph.graph.nodes if "relu_mlp" in str(node.target)]
    assert len(operators) == (backend != "reference")
    function(x).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "fc3" not in n)
    if name == "own":
        assert model.calls == 3


def test_whole_models_that_earlier_versions_pickled():
    """These pickles name a class and a function by their former modules."""
    assert pickle.loads(b"crelu_mlp.patching\nFusedSequential\n.") is FusedSequential
    original = "torch.nn.modules.transformer\nTransformerEncoderLayer"
    new = pickle.loads(f"crelu_mlp.rules\n_new\n(c{original}\ntR.".encode())
    assert type(new).__name__ == "FusedTransformerEncoderLayer"
