"""`fuse` changes how a model runs and nothing else.

As in test_module.py, integers make every sum exact, so fused and unfused models must agree to the
last bit. Models that cannot stay among the integers are compared in float64, within derived bounds.
"""

import copy
import itertools
import pickle
import textwrap
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import support
from relu_mlp import FusedSequential, FuseReport, ReluMLP, fuse, unfuse


def mlp(*sizes, inplace=False, last=(), dtype=None):
    children = []
    for n_in, n_out in itertools.pairwise(sizes):
        children += [nn.Linear(n_in, n_out, dtype=dtype), nn.ReLU(inplace=inplace)]
    return nn.Sequential(*children[:-1], *last)


def integer_input(*shape):
    torch.manual_seed(2)
    return torch.randint(-2, 3, shape).float()


def run(module, x):
    """The output, and the gradients of x, if it has one, and of all parameters."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    module.zero_grad()
    torch.manual_seed(3)  # for dropout
    y = module(x)
    y.backward((torch.arange(y.numel()) % 5 - 2).reshape(y.shape).to(y.dtype))
    return [y.detach(), x.grad, *[p.grad for p in module.parameters()]]


def fused_like(model, x, runs):
    """Fuses the model and checks that its results stay the same, with `runs` operators each way."""
    support.integers_(model)
    expected = run(model, x)
    names = [name for name, _ in model.named_modules()]
    modules, keys = list(model.modules()), list(model.state_dict())
    parameters = list(model.parameters())

    assert fuse(model) is model

    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with support.count_calls() as calls:
        actual = run(model, x)
    assert (calls["forward"], calls["backward"]) == (runs, runs)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        assert a is None or torch.equal(a, e)
    return model


# -- A Sequential that is a run ------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("sizes", [(3, 6, 4), (3, 6, 5, 4), (3, 6, 5, 6, 1)], ids=str)
def test_a_whole_sequential_becomes_a_relu_mlp(backend, sizes, inplace):
    model = fused_like(mlp(*sizes, inplace=inplace), integer_input(7, 3), runs=1)
    assert type(model) is ReluMLP
    assert model.recompute is False
    model.recompute = True
    with support.saved_tensors() as saved:
        run(model, integer_input(7, 3))
    assert not [tensor for tensor in saved if tensor.shape == (7, 6)]


def test_with_an_output_activation(backend):
    model = fused_like(mlp(3, 6, 4, last=[nn.ReLU()]), integer_input(7, 3), runs=1)
    assert type(model) is ReluMLP


@pytest.mark.parametrize("kind", [nn.Sigmoid, nn.Tanh])
def test_with_a_smooth_output_activation(backend, kind):
    model = mlp(3, 6, 4, last=[kind()]).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    expected = run(model, x)
    assert type(fuse(model)) is ReluMLP
    with support.count_calls() as calls:
        y, *_ = run(model, x)
    assert calls["forward"] == calls["backward"] == 1
    assert calls["native"] == 0
    weights, biases = support.layers_of(model)
    with torch.no_grad():
        hidden = [model[1](model[0](x))]
    exact = support.Exact(x, weights, biases, kind.__name__.lower(), hidden, y)
    exact.y.check(y, "y")
    exact.y.check(expected[0], "y before")


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_inputs_of_any_rank(backend, rank):
    fused_like(mlp(3, 6, 4), integer_input(*[2, 5, 7][: rank - 1], 3), runs=1)


def test_one_relu_used_again_and_no_bias(backend):
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 6, bias=False), relu, nn.Linear(6, 5), relu, nn.Linear(5, 4))
    support.integers_(model)
    x = integer_input(7, 3)
    expected = run(model, x)
    assert type(fuse(model)) is ReluMLP
    with support.count_calls() as calls:
        actual = run(model, x)
    assert calls["forward"] == calls["backward"] == 1
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


# -- A longer Sequential ---------------------------------------------------------------


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 6),
        nn.ReLU(inplace=True),
        nn.Linear(6, 5),
        nn.Dropout(0.5),  # scales by 2, exactly
        nn.Linear(5, 6),
        nn.ReLU(),
        nn.Linear(6, 4),
    )


def named():
    return nn.Sequential(
        OrderedDict(
            embedding=nn.Embedding(5, 3),
            up=nn.Linear(3, 6),
            on=nn.ReLU(),
            down=nn.Linear(6, 3),
            clip=nn.Hardtanh(-4, 4),
            wide=nn.Linear(3, 8),
            relu=nn.ReLU(),
            narrow=nn.Linear(8, 2),
            out=nn.ReLU(),
        )
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("make", "x"),
    [(convolutional, integer_input(7, 1, 4, 4)), (named, torch.arange(10).reshape(2, 5) % 5)],
    ids=["convolutional", "named"],
)
def test_a_longer_sequential_serves_its_runs(backend, make, x, training):
    model = fused_like(make().train(training), x, runs=2)
    assert type(model) is not ReluMLP
    assert isinstance(model, nn.Sequential)
    assert all(m.training == training for m in model.modules())


@pytest.mark.parametrize("make", [convolutional, named])
def test_slices_of_a_longer_one_are_plain(make):
    model = make()
    native = copy.deepcopy(model)
    fuse(model)
    for index in (slice(None, -1), slice(3, 6), slice(None)):
        assert type(model[index]) is nn.Sequential
        assert list(model[index]._modules) == list(native[index]._modules)
        assert all(a is b for a, b in zip(model[index], list(model)[index], strict=True))
    assert model[-1] is list(model)[-1]
    assert len(model) == len(native)


def test_checkpoints_and_copies_of_a_longer_one(backend, tmp_path):
    model, x = support.integers_(convolutional().eval()), integer_input(7, 1, 4, 4)
    expected = run(model, x)
    torch.save(fuse(model).state_dict(), tmp_path / "state.pt")
    torch.save(model, tmp_path / "model.pt")
    plain = convolutional().eval()
    plain.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    others = {"plain": plain, "loaded": loaded, "copied": copy.deepcopy(model)}
    for name, other in others.items():
        with support.count_calls() as calls:
            actual = run(other, x)
        assert calls["forward"] == calls["backward"] == (0 if name == "plain" else 2)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("edit", ["append", "delete", "insert", "replace"])
def test_children_edited_after_fuse(backend, edit):
    def change(model):
        if edit == "append":
            model.append(nn.ReLU()).append(support.integers_(nn.Linear(4, 2)))
        elif edit == "delete":
            del model[6]  # removes the dropout, which leaves two Linears in a row
        elif edit == "insert":
            model.insert(4, nn.Identity())
        else:
            model[8] = nn.GELU()

    model, x = support.integers_(convolutional()), integer_input(7, 1, 4, 4)
    native = copy.deepcopy(model)
    run(fuse(model), x)
    change(model)
    change(native)
    with support.count_calls() as calls:
        actual = run(model, x)
    assert calls["forward"] == {"append": 2, "delete": 2, "insert": 2, "replace": 1}[edit]
    expected = run(native, x)
    if edit == "replace":  # exact up to the GELU and native from there, but not on the way back
        actual, expected = actual[:1], expected[:1]
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


# -- Dropout and Identity are passed over ------------------------------------------------


def with_dropout(p=0.5, inplace=False):
    """Runs of two and three Linears, with modules in between that may do nothing."""
    return nn.Sequential(
        nn.Identity(),
        nn.Linear(3, 6),
        nn.Dropout(p, inplace),
        nn.ReLU(),
        nn.Identity(),
        nn.Dropout(p),
        nn.Linear(6, 4),
        nn.Dropout(p),  # not in the same run, because the ReLU ends it
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4, 4),
        nn.ReLU(),
        nn.Dropout(p),
        nn.Linear(4, 5),
        nn.ReLU(),
        nn.Linear(5, 2),
        nn.Dropout(p),
    )


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("p", "training", "runs"), [(0.5, True, 1), (0.5, False, 2), (0.0, True, 2), (1.0, False, 2)]
)
def test_dropout_that_does_nothing_is_passed_over(backend, p, training, runs, inplace):
    # in training with p = 1/2, the last two Linears run natively and drop the same units
    model = with_dropout(p, inplace).train(training)
    fused_like(model, integer_input(7, 3), runs)
    assert type(model) is FusedSequential


def test_the_mode_and_p_are_looked_at_in_every_call(backend):
    model, x = fuse(support.integers_(with_dropout())), integer_input(7, 3)
    native = nn.Sequential(*copy.deepcopy(unfuse(copy.deepcopy(model))))
    for p, training, runs in [(0.5, False, 2), (0.5, True, 1), (0.0, True, 2), (0.5, True, 1)]:
        for net in (model, native):
            net.train(training)
            for module in net:
                if isinstance(module, nn.Dropout):
                    module.p = p
        with support.count_calls() as calls:
            actual = run(model, x)
        assert calls["forward"] == calls["backward"] == runs
        assert all(torch.equal(a, e) for a, e in zip(actual, run(native, x), strict=True))


@pytest.mark.parametrize("position", [2, 4, 5])
def test_hooks_on_what_is_passed_over_are_called(backend, position):
    model, x = fuse(support.integers_(with_dropout().eval())), integer_input(7, 3)
    seen = []
    handle = model[position].register_forward_hook(lambda m, args, y: seen.append(m))
    with support.count_calls() as calls:
        run(model, x)
    assert seen == [model[position]]
    assert calls["forward"] == 1
    handle.remove()
    with support.count_calls() as calls:
        run(model, x)
    assert calls["forward"] == 2


def test_global_hooks_see_every_child(backend):
    model, x = fuse(support.integers_(with_dropout().eval())), integer_input(7, 3)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
    try:
        model(x)
    finally:
        handle.remove()
    assert seen == [*model, model]


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Identity])
def test_a_class_that_somebody_patched_is_called(backend, kind, monkeypatch):
    model, x = fuse(support.integers_(with_dropout().eval())), integer_input(7, 3)
    before = model(x)
    # A factor of 2 passes through ReLU, but after the biases it changes the result.
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * x)
    after = nn.Sequential(*model)(x)
    assert not torch.equal(before, after)
    assert torch.equal(model(x), after)


def test_a_dropout_that_natively_raises_does(backend):
    model = fuse(with_dropout().eval())
    model[5].p = 1.5
    with pytest.raises(ValueError, match="dropout probability"):
        model(integer_input(7, 3))


# -- The report, and back ------------------------------------------------------------------


def test_the_report():
    model = nn.Sequential(
        OrderedDict(
            plain=mlp(3, 4, 3),
            dropped=nn.Sequential(
                nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.25), nn.Linear(4, 3), nn.LayerNorm(3)
            ),
            parts=nn.Sequential(
                nn.Linear(3, 4),
                nn.GELU(),
                nn.Linear(4, 3),
                nn.ReLU(),
                MyLinear(3, 3),
                nn.ReLU(),
                hooked(nn.Linear(3, 3)),
                nn.ReLU(),
                nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
                nn.Softmax(),
                *mlp(3, 4, 3),
                nn.Identity(),
                *mlp(3, 4, 3),
                nn.Tanh(),
                nn.Linear(3, 3),
                nn.ReLU(),
            ),
            complex=mlp(3, 4, 3, dtype=torch.complex64),
            mine=MySequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)),
            own=with_own_forward(mlp(3, 4, 3)),
            experts=Experts(),
            made=ReluMLP(3, 4, 3),
            one=nn.Sequential(nn.Linear(3, 3), nn.ReLU()),
            unknown=Bare(),
        )
    )
    report = fuse(model, report=True)
    assert isinstance(report, FuseReport)
    assert report.model is model
    assert str(report) == textwrap.dedent("""\
        replaced: 7
          plain              Sequential  ReluMLP: 0 to 2 as one operator
          dropped            Sequential  FusedSequential: 0 to 3 as one operator; native in training, because a Dropout has p = 0.25
          parts              Sequential  FusedSequential: 10 to 12, 14 to 17 as one operator each
          experts.experts.0  Sequential  ReluMLP: 0 to 2 as one operator
          experts.experts.1  Sequential  ReluMLP: 0 to 2 as one operator
          experts.experts.2  Sequential  ReluMLP: 0 to 2 as one operator
          experts.heads.a    Sequential  ReluMLP: 0 to 2 as one operator
        left as it was: 12
          parts.0    Linear              is followed by GELU
          parts.2    Linear              is followed by ReLU and MyLinear, which is a subclass of Linear
          parts.4    MyLinear            is a subclass of Linear
          parts.6    Linear              carries a hook
          parts.8    ParametrizedLinear  is parametrized
          parts.18   Linear              is followed by ReLU and nothing
          complex.0  Linear              has a weight of torch.complex64
          complex.2  Linear              has a weight of torch.complex64
          mine       MySequential        is a subclass of Sequential
          own        Sequential          has a forward of its own
          made       ReluMLP             is fused already
          unknown    Bare                has no rule for its class: see register_fusion""")  # noqa: E501
    assert model.plain in [model.get_submodule(entry.name) for entry in report.replaced]

    again = fuse(model, report=True)
    assert not again.replaced
    assert {
        entry.reason for entry in again.left if entry.kind in ("ReluMLP", "FusedSequential")
    } == {"is fused already"}


class Bare(nn.Module):
    """Computes a network in a way that `fuse` does not recognize."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


@pytest.mark.parametrize("model", [mlp(3, 4, 3), nn.ReLU(), Bare()], ids=["run", "ReLU", "Bare"])
def test_the_report_on_one_module(model):
    text = str(fuse(model, report=True))
    if isinstance(model, nn.Sequential):
        expected = "replaced: 1\n  (the model)  Sequential  ReluMLP: 0 to 2 as one operator\n"
        assert text == expected + "left as it was: nothing"
    elif isinstance(model, nn.ReLU):
        assert text == "replaced: nothing\nleft as it was: nothing"
    else:
        expected = "replaced: nothing\nleft as it was: 1\n"
        assert (
            text == expected + "  (the model)  Bare  has no rule for its class: see register_fusion"
        )


@pytest.mark.parametrize("how", ["itself", "deepcopy", "pickle", "fused twice", "state_dict"])
def test_unfuse(backend, how):
    def make():
        return support.integers_(
            nn.Sequential(mlp(3, 6, 3), Residual(Bare()), with_dropout().eval())
        )

    def classes_and_attributes(model):
        return [(type(m), m.__dict__.keys()) for m in model.modules()]

    model, x = fuse(make()), integer_input(7, 3)
    run(model, x)  # by then a ReluMLP may cache something
    model[0].recompute = True
    if how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif how == "fused twice":
        fuse(model)
    elif how == "state_dict":
        model.load_state_dict(make().state_dict())
    with support.count_calls() as calls:
        run(model, x)
    assert calls["forward"] == 3
    assert unfuse(model) is model
    assert classes_and_attributes(model) == classes_and_attributes(make())
    with support.count_calls() as calls:
        actual = run(model, x)
    assert calls["forward"] == calls["backward"] == 0
    assert all(torch.equal(a, e) for a, e in zip(actual, run(make(), x), strict=True))
    assert type(fuse(model)[0]) is ReluMLP


def test_unfuse_leaves_what_was_never_fused():
    made = ReluMLP(3, 4, 2, recompute=True)
    model = nn.Sequential(
        made, ReluMLP.from_sequential(mlp(2, 4, 2)), FusedSequential(*mlp(2, 3, 2))
    )
    model.append(mlp(2, 3, 2)).append(MySequential(nn.Linear(2, 2)))
    kinds = [(type(m), m.__dict__.copy()) for m in model.modules()]
    assert unfuse(fuse(model)) is model
    assert [(type(m), m.__dict__) for m in model.modules()] == kinds
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        unfuse([made])


def test_nested_tensors_run_natively(backend):
    rows = [integer_input(2, 3), integer_input(5, 3)]
    for model in (mlp(3, 4, 2), nn.Sequential(nn.Identity(), *mlp(3, 4, 2))):
        fuse(support.integers_(model))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nested tensors are a prototype
            parts = model(torch.nested.nested_tensor(rows)).unbind()
        assert all(torch.equal(part, model(x)) for part, x in zip(parts, rows, strict=True))


# -- At any depth ---------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x + self.scale * self.inner(x)


class Experts(nn.Module):
    """Modules in lists and dicts, called in an unusual order."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(mlp(3, 4, 2) for _ in range(3))
        self.heads = nn.ModuleDict({"a": mlp(2, 3, 2), "b": nn.Linear(2, 2)})

    def forward(self, x):
        mixed = sum(expert(x) for expert in reversed(self.experts))
        return self.heads["b"](self.heads["a"](mixed))


def test_nested(backend):
    model = nn.Sequential(
        Residual(Residual(nn.Sequential(mlp(3, 4, 3), nn.Identity()))),
        nn.Sequential(nn.Flatten(), nn.Sequential(mlp(3, 4, 3))),
        Experts(),
    )
    fused_like(model, integer_input(7, 3), runs=6)
    assert type(model) is nn.Sequential
    assert all(type(expert) is ReluMLP for expert in model[2].experts)


def test_a_shared_sequential(backend):
    shared = mlp(3, 4, 3)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    fused_like(model, integer_input(7, 3), runs=2)
    assert type(shared) is ReluMLP
    assert model[0] is model[2]


def test_shared_layers(backend):
    # Linear modules used twice, and a weight shared by two modules
    layer = nn.Linear(3, 3)
    tied = nn.Linear(3, 3)
    tied.weight = layer.weight
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), tied)
    support.integers_(model)
    x = integer_input(7, 3)
    expected = run(model, x)
    with support.count_calls() as calls:
        actual = run(fuse(model), x)
    assert calls["forward"] == calls["backward"] == 1
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_fuse_twice(backend):
    model = fuse(
        nn.Sequential(mlp(3, 4, 3), nn.Flatten(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    )
    kinds = [type(m) for m in model.modules()]
    fused_like(model, integer_input(7, 3), runs=2)
    assert [type(m) for m in model.modules()] == kinds


def test_a_relu_mlp_keeps_its_settings():
    net = ReluMLP(3, 4, 2, recompute=True)
    fuse(nn.Sequential(net))
    assert type(net) is ReluMLP
    assert net.recompute is True


# -- What stays as it was ----------------------------------------------------------------


class MyLinear(nn.Linear):
    pass


class MySequential(nn.Sequential):
    pass


class MyReLU(nn.ReLU):
    pass


def hooked(module):
    module.register_forward_hook(lambda m, args, y: None)
    return module


def with_own_forward(module):
    module.forward = lambda x: nn.Sequential.forward(module, x)
    return module


STAYS = {
    "empty": lambda: nn.Sequential(),
    "one Linear": lambda: nn.Sequential(nn.Linear(3, 3)),
    "Linear and ReLU": lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU()),
    "two Linears": lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)),
    "leaky": lambda: nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.5), nn.Linear(4, 3)),
    "hardtanh": lambda: nn.Sequential(nn.Linear(3, 4), nn.Hardtanh(), nn.Linear(4, 3)),
    "ReLU6": lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU6(), nn.Linear(4, 3)),
    "alpha dropout": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.AlphaDropout(0.0), nn.Linear(4, 3)
    ),
    "hooked dropout": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), hooked(nn.Dropout(0.0)), nn.Linear(4, 3)
    ),
    "a forward of its own": lambda: with_own_forward(mlp(3, 4, 3)),
    "complex numbers": lambda: mlp(3, 4, 3, dtype=torch.complex64),
    "subclass of Linear": lambda: nn.Sequential(MyLinear(3, 4), nn.ReLU(), nn.Linear(4, 3)),
    "subclass at the end": lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), MyLinear(4, 3)),
    "subclass of ReLU": lambda: nn.Sequential(nn.Linear(3, 4), MyReLU(), nn.Linear(4, 3)),
    "subclass of Sequential": lambda: MySequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)),
}


@pytest.mark.parametrize("what", STAYS)
def test_stays_as_it_was(backend, what):
    model = STAYS[what]()
    kinds = [type(m) for m in model.modules()]
    if what in ("empty", "complex numbers"):
        assert type(fuse(model)) is nn.Sequential
        return
    fused_like(model, integer_input(7, 3), runs=0)
    assert [type(m) for m in model.modules()] == kinds


class OwnLinear(nn.Module):
    """As in some libraries: not a subclass of nn.Linear."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in))

    def forward(self, x):
        return x @ self.weight.T


class OwnMLP(nn.Sequential):
    def __init__(self, kind):
        super().__init__(kind(3, 4), nn.ReLU(), kind(4, 3))


class OwnList(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.lins = nn.ModuleList([kind(3, 4), kind(4, 3)])

    def forward(self, x):
        return self.lins[1](F.relu(self.lins[0](x)))


@pytest.mark.parametrize("kind", [OwnLinear, MyLinear])
@pytest.mark.parametrize("make", [OwnMLP, OwnList, lambda kind: nn.Sequential(*OwnMLP(kind))])
def test_the_report_names_linears_of_another_class(make, kind):
    model = make(kind)
    report = fuse(model, report=True)
    assert not report.replaced
    assert report.left
    for entry in report.left:
        if kind is OwnLinear:
            assert f"is not an nn.Linear but a {__name__}.OwnLinear" in entry.reason
        else:
            assert "is a subclass of Linear" in entry.reason


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_a_child_that_is_none(backend, position):
    model = nn.Sequential(mlp(3, 4, 3), nn.Sequential(*mlp(3, 4, 3), nn.Flatten()), mlp(3, 4, 3))
    model[1].register_module(str(position), None)
    fuse(model)
    assert type(model[0]) is type(model[2]) is ReluMLP
    assert type(model[1]) is (FusedSequential if position == 3 else nn.Sequential)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        model(integer_input(2, 3))
    unfuse(model)
    assert {type(m) for m in model} == {nn.Sequential}


def test_an_exception_leaves_the_model_as_it_was():
    model = nn.Sequential(mlp(3, 4, 3), with_dropout())
    model[1][2].p = "a"
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(TypeError):
        fuse(model)
    assert [type(m) for m in model.modules()] == kinds


def test_a_sequential_whose_class_somebody_patched_is_called(backend, monkeypatch):
    model, x = fuse(support.integers_(with_dropout().eval())), integer_input(7, 3)
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, x: 2 * x)
    assert torch.equal(model(x), 2 * x)


@pytest.mark.parametrize("name", ["forward", "__call__"])
def test_a_dropout_whose_class_somebody_patched_is_called(name, backend, monkeypatch):
    model, x = fuse(support.integers_(with_dropout().eval())), integer_input(7, 3)
    monkeypatch.setattr(nn.Dropout, name, lambda self, x: x + 1)
    assert torch.equal(model(x), nn.Sequential(*model)(x))


def test_gelu_stays(backend):
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3))
    assert type(fuse(model)) is nn.Sequential


def test_only_what_a_subclass_leaves_is_served(backend):
    model = nn.Sequential(MyLinear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    fused_like(model, integer_input(7, 3), runs=1)


@pytest.mark.parametrize(
    "model", [None, [nn.Linear(3, 4)], torch.ones(3), nn.Linear, "net"], ids=str
)
def test_not_a_module(model):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got"):
        fuse(model)


def test_a_single_linear_and_other_modules():
    for module in (nn.Linear(3, 4), nn.ReLU(), nn.LayerNorm(3)):
        kind = type(module)
        assert fuse(module) is module
        assert type(module) is kind


# -- What was there before fuse, and what comes after ----------------------------------


@pytest.mark.parametrize(
    "make",
    [lambda: mlp(3, 6, 4), lambda: nn.Sequential(nn.Flatten(), *mlp(3, 6, 4))],
    ids=["run", "longer"],
)
@pytest.mark.parametrize("training", [True, False])
def test_hooks_and_mode_of_the_sequential_are_kept(backend, make, training):
    model = make().train(training)
    seen = []
    model.register_forward_hook(lambda m, args, y: seen.append("forward"))
    model.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    model.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    model.note = "mine"
    fused_like(model, integer_input(7, 3), runs=1)
    assert seen == ["pre", "forward", "backward"] * 2
    assert model.training == training
    assert model.note == "mine"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("longer", [False, True])
def test_hooks_on_children_are_honoured(backend, longer, position, when):
    model = support.integers_(nn.Sequential(*mlp(3, 6, 4), *([nn.Identity()] if longer else [])))
    x = integer_input(7, 3)
    if when == "after":
        fuse(model)
    seen = []
    handles = [
        model[position].register_forward_hook(lambda m, args, y: seen.append(m)),
        model[position].register_full_backward_hook(lambda m, gi, go: seen.append(m)),
    ]
    if when == "before":
        fuse(model)
    with support.count_calls() as calls:
        actual = run(model, x)
    assert seen == [model[position]] * 2
    assert calls["forward"] == calls["backward"] == 0
    native = nn.Sequential(*model)
    assert all(torch.equal(a, e) for a, e in zip(actual, run(native, x), strict=True))
    assert seen == [model[position]] * 4
    for handle in handles:
        handle.remove()
    fuse(model)
    with support.count_calls() as calls:
        run(model, x)
    assert calls["forward"] == calls["backward"] == 1


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_an_optimizer_made_before(backend, name):
    model = support.integers_(nn.Sequential(nn.Flatten(), *mlp(3, 6, 4)))
    native = copy.deepcopy(model)
    x = integer_input(7, 3)
    for module in (model, native):
        optimizer = getattr(torch.optim, name)(module.parameters(), lr=0.25)
        if module is model:
            fuse(module)
        run(module, x)
        optimizer.step()
    # the gradients are equal, and the same code made the updates
    for a, e in zip(model.parameters(), native.parameters(), strict=True):
        assert torch.equal(a, e)


# -- Beyond the integers ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", [(3, 17, 4), (42, 123, 33, 6)], ids=str)
def test_within_the_bounds_of_rounding(backend, sizes, dtype):
    model = mlp(*sizes).to(dtype)
    x = torch.randn(31, sizes[0], dtype=dtype)
    grad_output = torch.randn(31, sizes[-1], dtype=dtype)
    weights, biases = support.layers_of(model)
    with torch.no_grad():
        hidden = [model[: 2 * n](x) for n in range(1, len(weights))]
    for fused in (0, 1):
        if fused:
            fuse(model)
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        with support.count_calls() as calls:
            y = model(leaf)
            y.backward(grad_output)
        assert calls["forward"] == calls["backward"] == fused
        exact = support.Exact(x, weights, biases, None, hidden, y)
        exact.y.check(y, "y")
        grads = exact.backward(grad_output)
        grads["x"].check(leaf.grad, "x.grad")
        for layer in range(len(weights)):
            grads[f"weights[{layer}]"].check(weights[layer].grad, f"{layer}.weight.grad")
            grads[f"biases[{layer}]"].check(biases[layer].grad, f"{layer}.bias.grad")


class T5Block(nn.Module):
    """Norm, attention and ReLU feed-forward, each with a residual, as in T5."""

    def __init__(self, width=8, wide=32):
        super().__init__()
        self.norm = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, wide, bias=False),
            nn.ReLU(),
            nn.Dropout(0.0),
            nn.Linear(wide, width, bias=False),
        )
        self.plain = nn.Sequential(
            OrderedDict(
                wi=nn.Linear(width, wide, bias=False),
                act=nn.ReLU(),
                wo=nn.Linear(wide, width, bias=False),
            )
        )

    def forward(self, x):
        q, k, v = self.qkv(self.norm[0](x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        h = self.norm[1](x)
        return x + self.plain(h) + self.feed_forward(h)


def test_a_transformer_block_trains_the_same(backend):
    """Every step's products are within the rounding bounds of the exact ones.

    Everything else in the block is the same code before and after `fuse`, so it is enough to
    compare the input and the output of the feed-forward network.
    """
    block = fuse(T5Block().double())
    assert type(block.plain) is ReluMLP
    assert type(block.feed_forward) is FusedSequential  # a Dropout would be skipped
    x, target = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    seen = {block.plain: {}, block.feed_forward: {}}
    for network in seen:
        network.register_forward_hook(lambda m, args, y: seen[m].update(x=args[0], y=y))
        network.register_full_backward_hook(
            lambda m, grad_input, grad_output: seen[m].update(gx=grad_input[0], gy=grad_output[0])
        )
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1, momentum=0.5)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        with support.count_calls() as calls:
            loss = F.mse_loss(block(x), target)
            loss.backward()
        assert calls["forward"] == calls["backward"] == 2
        losses.append(loss.item())
        for network, tensors in seen.items():
            weights, _ = support.layers_of(network)
            rows, y, gx, gy = (tensors[n].detach().reshape(-1, 8) for n in ("x", "y", "gx", "gy"))
            hidden = [F.linear(rows, weights[0]).relu()]
            exact = support.Exact(rows, weights, None, None, hidden, y)
            exact.y.check(y, "y")
            grads = exact.backward(gy)
            grads["x"].check(gx, "x.grad")
            for layer in (0, 1):
                grads[f"weights[{layer}]"].check(weights[layer].grad, f"weights[{layer}].grad")
        optimizer.step()
    assert losses[-1] < losses[0]
