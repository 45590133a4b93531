"""torch.export: the program is that of the `nn.Sequential`, node for node and name for name, and
loads without this package. Inside `backend("extension")` the layer is one operator in it. Both
compute, train, and can be saved and loaded as the module can.
"""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export.experimental import _export_forward_backward
from torch.nn.utils import parametrize

import relu_mlp
import support
from relu_mlp import FusedSequential, ReluMLP, fuse, unfuse

# PyTorch says this about its own code.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
]

OPERATOR = torch.ops.relu_mlp.relu_mlp.default
LINEAR = torch.ops.aten.linear.default
ROWS = torch.export.Dim("rows")


def plain(net):
    """The `nn.Sequential` of the same children."""
    return nn.Sequential(*net)


class Model(nn.Module):
    """The layer among others, and a layer made by `fuse`."""

    def __init__(self, is_plain=False):
        super().__init__()
        self.first = nn.Linear(3, 3)
        net = ReluMLP(3, [5, 4], 3, output_activation="relu")
        self.mlp = plain(net) if is_plain else net
        layers = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 2)]
        self.rest = nn.Sequential(*layers)
        if not is_plain:
            fuse(self.rest)
            assert type(self.rest) is FusedSequential

    def forward(self, input):
        return self.rest(self.mlp(self.first(input)))


class Functional(nn.Module):
    """The functional form, with a missing bias."""

    def __init__(self, function=relu_mlp.relu_mlp):
        super().__init__()
        self.function = function
        weights, biases = support.integer_network([3, 6, 4, 2], "some", torch.float32)
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList([biases[0], biases[2]])

    def forward(self, input):
        biases = [self.biases[0], None, self.biases[1]]
        return self.function(input, list(self.weights), biases, output_activation="tanh")


#: name: (module, operators in its graph, linear layers outside of them, all linear layers)
MODULES = {
    "net": (lambda: ReluMLP(3, [6, 4], 2), 1, 0, 3),
    "no biases": (lambda: ReluMLP(3, 6, 2, bias=False, output_activation="sigmoid"), 1, 0, 2),
    "model": (Model, 2, 2, 7),
    "functional": (Functional, 1, 0, 3),
}
STRICT = pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])


def made(name):
    """A module whose parameters are small integers, in evaluation mode."""
    return support.integers_(MODULES[name][0]()).eval()


def integers(*shape):
    return support.integers(*shape).float()


def exported(module, strict=False, rows=4):
    return torch.export.export(
        module, (integers(rows, 3),), dynamic_shapes=({0: ROWS},), strict=strict
    )


def count(program, target):
    return sum(node.target is target for node in program.graph.nodes)


# -- Without a request for the operator: the layers -------------------------------------


def nodes(program):
    """Everything that a tool may read: names, targets, arguments, and the module of each node."""
    signature = program.graph_signature
    described = []
    for node in program.graph.nodes:
        modules = [
            # A strict export names a module by its address.
            (path, kind.replace("relu_mlp.modules.ReluMLP", SEQUENTIAL))
            for path, kind in (node.meta.get("nn_module_stack") or {}).values()
        ]
        modules = [
            (p, k.replace("relu_mlp.fusion.sequential.FusedSequential", SEQUENTIAL))
            for p, k in modules
        ]
        sources = node.meta.get("source_fn_stack", [])
        described.append(
            (node.format_node(), node.kwargs, modules, sources, node.meta.get("torch_fn"))
        )
    return described, signature.input_specs, signature.output_specs


FUSED_SEQUENTIAL = "relu_mlp.fusion.sequential.FusedSequential"
SEQUENTIAL = "torch.nn.modules.container.Sequential"

#: name: (the exported module, its equivalent with PyTorch's layers)
PAIRS = {
    "net": lambda: (net := ReluMLP(3, [6, 4], 2), plain(net)),
    "no biases": lambda: (
        net := ReluMLP(3, 6, 2, bias=False, output_activation="sigmoid"),
        plain(net),
    ),
    "model": lambda: (Model(), Model(is_plain=True)),
    "functional": lambda: (Functional(), Functional(support.native_mlp)),
}


@pytest.mark.parametrize(
    ("name", "strict", "chosen"),
    [
        *itertools.product(PAIRS, [False], ["auto", "reference"]),
        ("model", True, "auto"),
        ("functional", True, "auto"),
    ],
)
def test_the_program_is_that_of_the_layers(name, strict, chosen):
    for training in (False, True):
        module, layers = (m.train(training) for m in PAIRS[name]())
        with relu_mlp.backend(chosen):
            assert nodes(exported(module, strict)) == nodes(exported(layers, strict))


def test_the_program_of_a_fused_model_is_that_of_the_model():
    model = Model(is_plain=True)
    expected = nodes(exported(model))
    assert type(fuse(model).mlp) is ReluMLP
    assert nodes(exported(model)) == expected
    assert nodes(exported(unfuse(model))) == expected


def test_a_module_with_a_rule():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    x = torch.randn(2, 3, 4)
    linears = count(torch.export.export(layer, (x,)), LINEAR)
    fuse(layer)
    program = torch.export.export(layer, (x,))
    assert (count(program, OPERATOR), count(program, LINEAR)) == (0, linears)
    torch.testing.assert_close(program.module()(x), layer(x))
    if "extension" in support.BACKENDS:
        with relu_mlp.backend("extension"):
            program = torch.export.export(layer, (x,))
        assert (count(program, OPERATOR), count(program, LINEAR)) == (1, linears - 2)


@pytest.mark.parametrize("way", ["joint", "fake", "tied", "no_grad", "keyword"])
def test_other_ways_of_export(way):
    """Each gives the same as for the `nn.Sequential`."""
    net = ReluMLP(3, [3, 3], 2)
    if way == "tied":
        net[2].weight = net[0].weight
    programs = [OTHER_WAYS[way](module) for module in (net, plain(net))]
    assert nodes(programs[0]) == nodes(programs[1])


def joint(module):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = module

        def forward(self, input):
            return self.net(input).square().mean()

    program = torch.export.export(Loss(), (integers(4, 3),))
    return _export_forward_backward(program, joint_loss_index=0)


def under_fake_tensors(module):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        net = copy.deepcopy(module)
        return torch.export.export(net, (mode.from_tensor(integers(4, 3)),))


def without_gradients(module):
    with torch.no_grad():
        return exported(module)


OTHER_WAYS = {
    "joint": joint,
    "fake": under_fake_tensors,
    "tied": exported,
    "no_grad": without_gradients,
    "keyword": lambda module: torch.export.export(module, (), {"input": integers(4, 3)}),
}

WITHOUT_THE_PACKAGE = """
import sys
sys.modules["relu_mlp"] = None  # to import it is an error
import torch
x, expected = torch.load("values.pt")
for strict in (False, True):
    runs = torch.export.load(f"{strict}.pt2").module()
    print(torch.equal(runs(x), expected))
    runs(x).sum().backward()
    print(all(p.grad is not None for p in runs.parameters()))
"""


def test_the_program_loads_without_the_package(tmp_path):
    module = made("model")
    x = integers(5, 3)
    for strict in (False, True):
        torch.export.save(exported(module, strict), tmp_path / f"{strict}.pt2")
    torch.save((x, module(x).detach()), tmp_path / "values.pt")
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["True"] * 4


def test_only_a_graph_that_leaves_python_is_of_layers():
    """A compiled function keeps the operator, both during an export and afterwards."""
    module = made("net")
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x = integers(5, 3)
    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(module, backend=keep, fullgraph=True)(x)
        exported(module, strict=True)
    calls = [count(graph, OPERATOR) for graph in graphs]
    assert calls == [int("extension" in support.BACKENDS)] * 2


# -- Inside `backend("extension")`: the operator -----------------------------------------


@pytest.mark.parametrize(
    ("name", "strict"),
    [*itertools.product(MODULES, [False]), ("model", True), ("functional", True)],
)
def test_one_operator(name, strict, backend, tmp_path):
    module = made(name)
    _, fused, outside, linears = MODULES[name]
    module(integers(2, 3))  # by then it may cache something
    program = exported(module, strict)
    assert list(program.state_dict) == list(module.state_dict())
    torch.export.save(program, tmp_path / "program.pt2")
    for form in (program, torch.export.load(tmp_path / "program.pt2")):
        if backend == "extension":
            assert (count(form, OPERATOR), count(form, LINEAR)) == (fused, outside)
        elif not strict or torch.__version__ >= "2.13":
            # Dynamo of 2.11 does not see which backend a thread has chosen.
            assert (count(form, OPERATOR), count(form, LINEAR)) == (0, linears)
        runs = form.module()
        for rows in (5, 1, 0):
            x = integers(rows, 3)
            support.assert_same(runs(x), module(x))


@STRICT
def test_decompositions_leave_it_whole(strict, backend):
    module = made("model")
    program = exported(module, strict).run_decompositions()
    is_fused = backend == "extension"
    assert count(program, OPERATOR) == (2 if is_fused else 0)
    if is_fused or not strict or torch.__version__ >= "2.13":  # see test_one_operator
        assert count(program, torch.ops.aten.addmm.default) == (2 if is_fused else 7)
    x = integers(5, 3)
    support.assert_same(program.module()(x), module(x))


def test_training(backend):
    """An exported program can be trained as it is."""
    module = made("model")
    runs = exported(module).module()
    twin = copy.deepcopy(module)
    x = integers(5, 3)
    results = []
    for net in (twin, runs):
        leaf = x.clone().requires_grad_()
        with support.count_calls() as calls:
            y = net(leaf)
            y.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
        results.append({"y": y.detach(), "x": leaf.grad, **gradients})
    support.assert_same(results[1], results[0])
    if backend == "extension":
        assert (calls["forward"], calls["backward"]) == (2, 2)


@pytest.mark.parametrize("rows", [1, 0])
def test_example_of_few_rows(rows):
    """PyTorch may specialize a size of 1 or 0. Then it says so; otherwise the program is right."""
    module = made("net")
    try:
        runs = exported(module, rows=rows).module()
    except torch._dynamo.exc.UserError as error:
        assert "specialized" in str(error)
    else:
        x = integers(5, 3)
        support.assert_same(runs(x), module(x))


def test_leading_dimensions(backend):
    module = made("net")
    shapes = ({0: ROWS, 1: torch.export.Dim("columns")},)
    program = torch.export.export(module, (integers(2, 4, 3),), dynamic_shapes=shapes)
    assert count(program, OPERATOR) == (backend == "extension")
    for shape in [(5, 7, 3), (1, 1, 3), (3, 0, 3)]:
        x = integers(*shape)
        support.assert_same(program.module()(x), module(x))


class Plus(nn.Module):
    def forward(self, input):
        return input + 1


@pytest.mark.parametrize(
    ("change", "strict"),
    [("hook", False), ("child", False), ("parametrization", False), ("hook", True)],
)
def test_changed_children_run_natively(change, strict):
    net = made("net")
    x = integers(5, 3)
    unchanged = net(x)
    if change == "hook":
        net[2].register_forward_hook(lambda module, arguments, output: 2 * output)
    elif change == "child":
        net[1] = Plus()
    else:
        parametrize.register_parametrization(net[0], "weight", Plus())
    program = exported(net, strict)
    assert (count(program, OPERATOR), count(program, LINEAR)) == (0, 3)
    support.assert_same(program.module()(x), net(x))
    assert not torch.equal(net(x), unchanged)


def test_other_dtypes_run_natively():
    net = ReluMLP(3, [], 2, dtype=torch.complex64)
    x = integers(5, 3).to(torch.complex64)
    program = torch.export.export(net, (x,))
    assert (count(program, OPERATOR), count(program, LINEAR)) == (0, 1)
    support.assert_same(program.module()(x), net(x))


def test_a_wrong_shape_is_an_error_at_export():
    with pytest.raises(RuntimeError):
        torch.export.export(made("net"), (integers(5, 4),))


def test_module_is_as_before(backend):
    module = made("model")
    before = {name: type(child) for name, child in module.named_modules()}
    exported(module)
    assert {name: type(child) for name, child in module.named_modules()} == before
    with support.count_calls() as calls:
        module(integers(5, 3))
    assert calls["forward"] == 2
