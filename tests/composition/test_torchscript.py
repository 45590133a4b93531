"""TorchScript: a trace is that of the `nn.Sequential`, node for node and scope for scope. Traced
inside `backend("extension")`, and scripted, the layer is one operator, saved and loaded. Where
the layer runs its children one by one, its script does too.
"""

import copy
import io
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import relu_mlp
import support
from relu_mlp import FusedSequential, ReluMLP, fuse, ops

# PyTorch says this about TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


class Model(nn.Module):
    """The layer among others, and layers made by `fuse`."""

    def __init__(self, is_plain=False):
        super().__init__()
        self.first = nn.Linear(3, 3)
        net = ReluMLP(3, [5, 4], 3)
        self.mlp = nn.Sequential(*net) if is_plain else net
        self.rest = nn.Sequential(
            nn.Linear(3, 4),
            nn.ReLU(),
            nn.Linear(4, 5, bias=False),
            nn.Dropout(0.5),
            nn.Linear(5, 4),  # one Linear is not a run
            nn.Identity(),
            nn.Linear(4, 6),
            nn.ReLU(),
            nn.Linear(6, 2),
            nn.ReLU(),
        )
        if not is_plain:
            fuse(self.rest)
            assert type(self.rest) is FusedSequential

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.mlp(self.first(x)))


def without_a_bias():
    net = ReluMLP(3, [6, 4], 2)
    net[2].bias = None
    return net


#: name: (module, operators in its graph, linear layers outside of them, all linear layers)
MODULES = {
    "net": (lambda: ReluMLP(3, [6, 4], 2), 1, 0, 3),
    "tanh": (lambda: ReluMLP(3, 6, 2, output_activation="tanh"), 1, 0, 2),
    "relu": (lambda: ReluMLP(3, 6, 2, output_activation="relu"), 1, 0, 2),
    "no biases": (lambda: ReluMLP(3, 6, 2, bias=False), 1, 0, 2),
    "a bias missing": (without_a_bias, 1, 0, 3),
    "linear": (lambda: ReluMLP(3, [], 2), 1, 0, 1),
    "model": (Model, 3, 2, 9),
}

#: Ways to turn a module into TorchScript.
WAYS = {
    "script": torch.jit.script,
    "trace": lambda module: torch.jit.trace(module, (support.integers(4, 3).float(),)),
}


def made(name):
    """A module whose parameters are small integers, in evaluation mode."""
    return support.integers_(MODULES[name][0]()).eval()


def integers(*shape):
    return support.integers(*shape).float()


def reloaded(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


def count(scripted, operator):
    graph = str(scripted.inlined_graph)
    return graph.count(f"{operator}(")


def assert_graph(scripted, fused, linears):
    assert count(scripted, "relu_mlp::relu_mlp") == fused
    assert count(scripted, "aten::linear") == linears


# -- A trace: the layers ---------------------------------------------------------------


def text_of(traced):
    """The graph of a trace: names and scopes of modules and nodes, and their places in Python."""
    text = f"{traced.graph}{traced.inlined_graph}"
    text = re.sub(r"\.___torch_mangle_\d+", "", text)
    for ours in ("relu_mlp.modules.ReluMLP", "relu_mlp.fusion.sequential.FusedSequential"):
        text = text.replace(ours, "torch.nn.modules.container.Sequential")
    return text


@pytest.mark.parametrize("chosen", ["auto", "reference"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", MODULES)
def test_a_trace_is_that_of_the_layers(name, training, chosen):
    net = made(name)
    layers = Model(is_plain=True) if name == "model" else nn.Sequential(*net)
    with relu_mlp.backend(chosen):
        traces = [
            torch.jit.trace(module.train(training), integers(4, 3), check_trace=not training)
            for module in (net, layers)
        ]
    ours, expected = map(text_of, traces)
    assert ours == expected
    assert "aten::linear" in ours


@pytest.mark.parametrize("chosen", ["auto", *support.BACKENDS])
@pytest.mark.parametrize("name", ["net", "no biases", "model"])
def test_a_trace_under_autocast_passes_its_check(name, chosen):
    module = made(name)
    x = integers(5, 3)
    with relu_mlp.backend(chosen):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            traced = torch.jit.trace(module, integers(4, 3))
            expected = module(x)
        assert expected.dtype is torch.bfloat16
        support.assert_same(traced(x), expected)


# -- A script, and a trace inside `backend("extension")`: the operator ---------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODULES)
def test_one_operator(name, way, backend):
    module = made(name)
    _, fused, outside, linears = MODULES[name]
    module(integers(2, 3))  # by then it may cache something
    scripted = WAYS[way](module)
    for form in (scripted, reloaded(scripted)):
        if backend == "extension":
            assert_graph(form, fused, outside)
        else:
            assert_graph(form, 0, linears)
        assert list(form.state_dict()) == list(module.state_dict())
        for shape in [(5, 3), (1, 3), (0, 3), (3,), (2, 4, 3)]:
            if way == "trace" and backend == "reference" and len(shape) == 1:
                continue  # natively, too, a trace of a matrix works only for matrices
            x = integers(*shape)
            support.assert_same(form(x), module(x))
    with torch.no_grad(), support.count_calls() as calls:
        scripted(integers(5, 3))
    assert calls["forward"] == (fused if backend == "extension" else 0)


def test_frozen(backend):
    module = made("model")
    frozen = torch.jit.freeze(torch.jit.script(module))
    assert str(frozen.graph).count("relu_mlp::relu_mlp(") == (3 if backend == "extension" else 0)
    x = integers(5, 3)
    with torch.no_grad():
        for form in (frozen, reloaded(frozen), torch.jit.optimize_for_inference(frozen)):
            for _ in range(3):  # the first calls profile, the next are optimized
                support.assert_same(form(x), module(x))


@pytest.mark.parametrize("way", WAYS)
def test_training(way, backend):
    module = made("model")
    x = integers(5, 3)
    twin = copy.deepcopy(module)
    scripted = WAYS[way](module)
    for _ in range(3):
        results = []
        for net in (twin, scripted):
            net.zero_grad()
            leaf = x.clone().requires_grad_()
            with support.count_calls() as calls:
                y = net(leaf)
                y.square().sum().backward()
            results.append([y.detach(), leaf.grad, *[p.grad for p in net.parameters()]])
        for actual, expected in zip(*reversed(results), strict=True):
            support.assert_same(actual, expected)
        if backend == "extension":
            assert (calls["forward"], calls["backward"]) == (3, 3)


def test_second_derivative(backend):
    module = made("tanh").double()
    scripted = torch.jit.script(module)
    x = (support.integers(5, 3) / 16).requires_grad_()
    assert torch.autograd.gradgradcheck(scripted, (x,))


@pytest.mark.parametrize("way", WAYS)
def test_the_model_stays_as_it_is(way, backend):
    module = made("model")
    before = {name: type(child) for name, child in module.named_modules()}
    x = integers(5, 3)
    WAYS[way](module)
    assert {name: type(child) for name, child in module.named_modules()} == before
    with support.count_calls() as calls:
        module(x)
    assert calls["forward"] == 3


def test_other_dtypes(backend):
    scripted = torch.jit.script(made("net")).double()
    x = support.integers(5, 3)
    support.assert_same(scripted(x), made("net").double()(x))
    assert scripted(x).dtype is torch.float64


def test_complex_networks_are_native(backend):
    module = ReluMLP(3, [], 2, dtype=torch.complex64)
    scripted = torch.jit.script(module)
    assert_graph(scripted, 0, 1)
    x = integers(5, 3).to(torch.complex64)
    support.assert_same(scripted(x), module(x))


@pytest.mark.parametrize("x", [torch.ones(5, 4), torch.ones(5, 3, dtype=torch.int64)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_what_the_layer_refuses(way, x, backend):
    module = made("net")
    scripted = WAYS[way](module)
    for net in (module, scripted):
        with pytest.raises(RuntimeError):
            net(x)


def test_children_and_slices(backend):
    module = made("net")
    scripted = torch.jit.script(module)
    x = integers(5, 3)
    assert len(scripted) == 5
    support.assert_same(scripted[0](x), module[0](x))
    support.assert_same(scripted[:-1](x), module[:-1](x))


# -- Where the children run one by one --------------------------------------------


def double_it(module, arguments: tuple[Tensor], output: Tensor):
    return 2 * output


class Plus(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return input + 1


def with_hook(net):
    net[2].register_forward_hook(double_it)


def with_another_child(net):
    net[1] = Plus()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", [with_hook, with_another_child])
def test_changed_children_run_natively(change, way, backend):
    net = made("net")
    x = integers(5, 3)
    unchanged = net(x)
    change(net)
    scripted = WAYS[way](net)
    assert_graph(scripted, 0, 3)
    support.assert_same(scripted(x), net(x))
    assert not torch.equal(net(x), unchanged)


def test_only_the_changed_run_is_native(backend):
    model = made("model")
    model.rest[8].register_forward_hook(double_it)
    scripted = torch.jit.script(model)
    if backend == "extension":
        assert_graph(scripted, 2, 4)
    x = integers(5, 3)
    support.assert_same(scripted(x), model(x))


@pytest.mark.parametrize("change", ["parametrized", "pruned", "forward", "global hook"])
def test_traced_with_what_can_not_be_scripted(change, backend):
    net = made("net")
    handle = None
    if change == "parametrized":
        nn.utils.parametrize.register_parametrization(net[0], "weight", Plus())
    elif change == "pruned":
        prune.ln_structured(net[0], "weight", 2, 1, 0)
    elif change == "forward":
        net[1].forward = Plus().forward
    else:
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, x, y: 2 * y if type(module) is nn.Linear else y
        )
    try:
        traced = WAYS["trace"](net)
        x = integers(5, 3)
        expected = net(x)
    finally:
        if handle is not None:
            handle.remove()
    assert_graph(traced, 0, 3)
    support.assert_same(traced(x), expected)


def test_hooks_on_all_modules_leave_scripts_native(backend):
    # TorchScript ignores them, in every module.
    net = made("net")
    handle = nn.modules.module.register_module_forward_hook(lambda module, x, y: None)
    try:
        assert_graph(torch.jit.script(net), 0, 3)
    finally:
        handle.remove()


# -- The functional form and the operator --------------------------------------------


def test_functional_form_traced(backend):
    weights, biases = support.integer_network([3, 6, 2], "some", requires_grad=False)

    def function(x):
        return relu_mlp.relu_mlp(x, weights, biases, output_activation="relu")

    traced = torch.jit.trace(function, (support.integers(4, 3),))
    assert str(traced.graph).count("relu_mlp::relu_mlp(") == (backend == "extension")
    assert str(traced.graph).count("aten::linear(") == 2 * (backend == "reference")
    with relu_mlp.backend("auto"):
        traced_by_default = torch.jit.trace(function, (support.integers(4, 3),))
    assert str(traced_by_default.graph).count("aten::linear(") == 2
    for rows in (5, 1, 0):
        x = support.integers(rows, 3)
        support.assert_same(traced(x), function(x))


def operator_in_a_script(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return torch.ops.relu_mlp.relu_mlp(x, weights, biases, "tanh")


def test_operator_scripted():
    weights, biases = support.make_network([3, 6, 2])
    x = torch.randn(5, 3, dtype=torch.float64)
    scripted = torch.jit.script(operator_in_a_script)
    support.assert_same(scripted(x, weights, biases), operator_in_a_script(x, weights, biases))


# -- Without the package --------------------------------------------------------------

WITHOUT_THE_PACKAGE = """
import sys, warnings
import torch

library, folder = sys.argv[1:]
warnings.filterwarnings("error")
warnings.filterwarnings("ignore", ".*torch.jit.*")
x, expected = torch.load(f"{folder}/values.pt")
net = torch.jit.load(f"{folder}/layers.pt")
print(torch.equal(net(x), expected))
net(x).sum().backward()
print(all(p.grad is not None for p in net.parameters()))
try:
    torch.jit.load(f"{folder}/script.pt")
except RuntimeError as error:
    print("relu_mlp::relu_mlp" in str(error))
torch.ops.load_library(library)
for form in ("script", "trace"):
    net = torch.jit.load(f"{folder}/{form}.pt")
    with torch.no_grad():
        print(torch.equal(net(x), expected))
    y = net(x)
    try:
        y.sum().backward()
    except UserWarning as warning:
        print("relu_mlp::relu_mlp" in str(warning) and "backprop" in str(warning))
print(any(name.startswith("relu_mlp") for name in sys.modules))
"""


@pytest.mark.slow
@pytest.mark.skipif(ops.LIBRARY_PATH is None, reason="is about the library")
def test_library_without_the_package(tmp_path):
    """It computes, and says that there is no derivative without the package. A default trace needs
    neither the library nor the package.
    """
    net = made("model")
    x = integers(5, 3)
    WAYS["trace"](net).save(tmp_path / "layers.pt")
    with relu_mlp.backend("extension"):
        for name, way in WAYS.items():
            way(net).save(tmp_path / f"{name}.pt")
    torch.save((x, net(x).detach()), tmp_path / "values.pt")
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, ops.LIBRARY_PATH, tmp_path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["True"] * 7 + ["False"]
