"""torch.compile of the layer and of models that contain it: no graph break, the same bits as eager,
and the operators in the graph.

On the reference the layers are traced natively, by contract. Then the graph has products and none
of the operators, and equals the native network.
"""

import re

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import relu_mlp
import support
from support import assert_same, integer_network, integers, integers_, twins

pytestmark = [
    pytest.mark.slow,
    # PyTorch says this about the compilers that these tests use.
    pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning"),
]

PRODUCTS = {"mm", "addmm", "bmm", "linear", "matmul", "linear_backward"}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def graphs():
    """A compiler that records the operators of each forward and backward graph, by name."""
    kept = []

    def keep(graph_module, inputs):
        calls = [node.target for node in graph_module.graph.nodes if node.op == "call_function"]
        kept.append([str(call) for call in calls if isinstance(call, torch._ops.OpOverload)])
        return graph_module

    keep.backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    keep.kept = kept
    return keep


def assert_operators(backend, graphs, expected):
    """One operator each way and no product beside it. On the reference it is the reverse."""
    fused = [[name for name in graph if name.startswith("relu_mlp.")] for graph in graphs]
    products = [[n for n in graph if n.split(".")[1] in PRODUCTS] for graph in graphs]
    if backend == "extension":
        assert fused == [[f"relu_mlp.{name}.default"] for name in expected]
        assert not any(products)
    else:
        assert not any(fused) and all(products)


def step(model, x):
    """y, and the gradients of a loss with respect to x and every parameter."""
    leaf = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(leaf)
    y.square().sum().backward()
    named = model.named_parameters()
    grads = {re.sub(r"^(_orig_mod\.)?(net\.)?", "", name): p.grad.clone() for name, p in named}
    return {"y": y.detach(), "x": leaf.grad, **grads}


class Block(nn.Module):
    """A model around the layer that gives Inductor something to fuse."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.norm = nn.LayerNorm(6, dtype=dtype)
        self.mlp = relu_mlp.ReluMLP(6, [9, 7], 6, output_activation="tanh", dtype=dtype)

    def forward(self, x):
        return x + self.mlp(self.norm(x)) * 2


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", support.ACTIVATIONS, ids=str)
def test_one_operator_each_way(backend, graphs, activation, recompute):
    net, native = twins(3, [4, 5], 2, output_activation=activation, recompute=recompute)
    integers_(net)
    integers_(native)
    x = integers(6, 3, dtype=torch.float32)
    compiled = torch.compile(net, backend=graphs.backend, fullgraph=True)
    actual, eager = step(compiled, x), step(net, x)
    assert_same(actual, eager)
    if activation in (None, "relu"):  # exact in any order
        assert_same(eager, step(native, x))
    assert_operators(backend, graphs.kept, ["forward", "backward"])


def test_inference_is_the_public_operator(backend, graphs):
    net, _ = twins(3, [4, 5], 2)
    x = torch.randn(6, 3)
    with torch.no_grad():
        y = torch.compile(net, backend=graphs.backend, fullgraph=True)(x)
        assert torch.equal(y, net(x))
    assert_operators(backend, graphs.kept, ["relu_mlp"])


def test_inductor_where_ci_is_set(backend, monkeypatch):
    """With CI set, Inductor also checks that no operator could be decomposed."""
    monkeypatch.setenv("CI", "true")
    net, x = integers_(relu_mlp.ReluMLP(3, [4, 5], 2)), integers(6, 3, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(torch.compile(net, fullgraph=True)(x), net(x))


def test_frozen_parameters_are_not_differentiated(graphs):
    """The backward operator in the graph computes the needed gradients and no others."""
    net = integers_(relu_mlp.ReluMLP(3, [4, 5], 2))
    net[0].requires_grad_(False)
    counts = []

    def count(graph_module, inputs):
        for node in graph_module.graph.nodes:
            if node.target is torch.ops.relu_mlp.backward.default:
                counts.append(node.args[3])
        return graph_module

    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    torch.compile(net, backend=backend, fullgraph=True)(torch.ones(6, 3)).sum().backward()
    assert counts == ["0" + "011" + "011"]


def test_no_recompilation_for_another_batch_size(backend):
    net, _ = twins(3, [4, 5], 2, output_activation="sigmoid")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=True)
    for rows in (6, 5, 33, 2, 128):
        x = torch.randn(rows, 3)
        assert_same(step(compiled, x), step(net, x))
    assert counter.frame_count == 1


def test_inside_a_model_by_inductor(backend):
    model, x = Block(), torch.randn(10, 6)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    actual, eager = step(compiled, x), step(model, x)
    for name, expected in eager.items():
        # Inductor has its own LayerNorm: a row of 6, about ten roundings, and the layer's
        # derivative of that. The layer alone has equal bits, see above.
        torch.testing.assert_close(actual[name], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("compiler", ["aot_eager", "eager"])
def test_the_same_bits_inside_a_model(backend, compiler):
    model, x = Block(torch.float64), torch.randn(10, 6, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    actual, eager = step(compiled, x), step(model, x)
    for name in eager:
        if "mlp" in name or name == "y":  # LayerNorm's backward pass is decomposed
            assert_same(actual[name], eager[name], name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(backend, use_reentrant):
    net, _ = twins(3, [4, 5], 2)
    x = torch.randn(6, 3)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=use_reentrant)

    # PyTorch itself breaks the graph at a reentrant checkpoint.
    compiled = torch.compile(Checkpointed(), backend="aot_eager", fullgraph=not use_reentrant)
    assert_same(step(compiled, x), step(net, x))


@pytest.mark.parametrize("kind", ["module", "recompute", "operator"])
def test_compiled_autograd(backend, kind):
    """The backward pass of an eager forward pass, traced and compiled."""
    net = integers_(relu_mlp.ReluMLP(3, [4, 5], 2, recompute=kind == "recompute"))
    x = integers(6, 3, dtype=torch.float32).requires_grad_()
    inputs = [x, *net.parameters()]

    def gradients():
        if kind == "operator":
            y = torch.ops.relu_mlp.relu_mlp(x, inputs[1::2], inputs[2::2])
        else:
            y = net(x)
        for tensor in inputs:
            tensor.grad = None
        y.square().sum().backward()
        return [tensor.grad for tensor in inputs]

    expected = gradients()
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    with compiled_autograd._enable(compiler):
        assert_same(dict(enumerate(gradients())), dict(enumerate(expected)))


def test_a_whole_training_step(backend):
    """Forward pass, loss, backward pass and the optimizer's step in one compiled function."""
    results = []
    for compile_it in (False, True):
        torch.manual_seed(0)
        net = relu_mlp.ReluMLP(3, [4, 5], 2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        x, target = torch.randn(6, 3), torch.randn(6, 2)

        def train(net=net, optimizer=optimizer, x=x, target=target):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x), target)
            loss.backward()
            optimizer.step()
            return loss.detach()

        function = torch.compile(train, backend="aot_eager") if compile_it else train
        losses = torch.stack([function() for _ in range(3)])
        results.append({"losses": losses, **{n: p.detach() for n, p in net.named_parameters()}})
    assert_same(*results)
    assert results[0]["losses"].unique().numel() == 3


def test_a_hook_on_a_child_compiles_natively(backend, graphs):
    net, native = twins(3, [4, 5], 2)
    integers_(net)
    integers_(native)
    for model in (net, native):
        model[0].register_forward_hook(lambda module, args, output: output * 2)
    x = integers(6, 3, dtype=torch.float32)
    compiled = torch.compile(net, backend=graphs.backend, fullgraph=True)
    assert_same(step(compiled, x), step(native, x))
    assert not any("relu_mlp." in name for graph in graphs.kept for name in graph)


def test_a_second_derivative_is_refused_by_pytorch_or_right(backend):
    """AOTAutograd has no double backward, and says so."""
    weights, _ = integer_network([3, 4, 2])
    x = integers(5, 3).requires_grad_()
    compiled = torch.compile(
        lambda x: relu_mlp.relu_mlp(x, weights, output_activation="tanh"), backend="aot_eager"
    )
    (by_x,) = torch.autograd.grad(compiled(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        by_x.square().sum().backward()


def replace_the_output_activation(net):
    net[3] = nn.Tanh()


def replace_a_hidden_activation(net):
    net[1] = nn.Tanh()


def replace_a_layer(net):
    net[2] = nn.Linear(4, 2)
    integers_(net)
    net[2].bias.data += 1


def call_something_else(net):
    net[1].forward = lambda x: -x


def parametrize(net):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(net[0], "weight", Double())


CHANGES = {
    "output activation": replace_the_output_activation,
    "hidden activation": replace_a_hidden_activation,
    "layer": replace_a_layer,
    "forward": call_something_else,
    "parametrization": parametrize,
    "no bias": lambda net: net[0].register_parameter("bias", None),
    "dtype": lambda net: net.double(),
    "frozen": lambda net: net.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_compiling_is_seen(backend, change):
    """The compiled layer notices these changes without comparing everything in every call."""
    net = relu_mlp.ReluMLP(3, 4, 2, output_activation="relu")
    integers_(net)
    x = integers(6, 3, dtype=torch.float32)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    before = compiled(x)
    torch.testing.assert_close(before, nn.Sequential.forward(net, x), rtol=0, atol=0)
    CHANGES[change](net)
    x = x.to(net[0].weight.dtype)
    after, expected = compiled(x), nn.Sequential.forward(net, x)
    torch.testing.assert_close(after, expected, rtol=0, atol=0)
    assert after.requires_grad == expected.requires_grad
    if change not in ("dtype", "frozen"):
        assert not torch.equal(after, before)


def test_the_compiled_layer_compares_little(monkeypatch):
    """Every comparison is made in every call. Three times as many took a tenth of a small step."""
    counts = {}

    def count(name, model):
        def hook(guards):
            counts[name] = len(guards)
            return [True] * len(guards)

        torch.compiler.reset()
        torch.compile(model, backend="eager", options={"guard_filter_fn": hook})(torch.ones(5, 3))

    net, native = twins(3, [4], 2)
    count("fused", net)
    count("native", native)
    assert 0 < counts["fused"] <= 1.5 * counts["native"], counts
