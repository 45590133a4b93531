"""ONNX: a file of Gemm, Relu and the output activation, and nothing specific to this package.
onnxruntime computes the same numbers from it.

The networks have small integers, so every sum is exact. Sigmoid and tanh get multiples of 200,
where they are 0, 1/2, 1 or -1, 0, 1 in float32.
"""

import io
from collections import Counter

import pytest
import torch
from torch import nn

import relu_mlp
import support
from relu_mlp import ReluMLP, fuse, reference

#: Nothing here depends on whether the native node records a graph.
backend = support.backend_fixture(support.BACKENDS)

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# PyTorch says this about its own code.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

ROWS = torch.export.Dim("rows")


def integers(*shape):
    return support.integers(*shape).float()


def made(net):
    """The network with small integers, and multiples of 200 before sigmoid and tanh."""
    support.integers_(net)
    if isinstance(net[-1], (nn.Sigmoid, nn.Tanh)):
        with torch.no_grad():
            for parameter in net[-2].parameters():
                parameter.mul_(200)
    return net.eval()


def from_module(net, x):
    return torch.onnx.export(net, (x,), dynamo=True, verbose=False, dynamic_shapes=({0: ROWS},))


def from_program(strict):
    def write(net, x):
        program = torch.export.export(net, (x,), dynamic_shapes=({0: ROWS},), strict=strict)
        return torch.onnx.export(program, dynamo=True, verbose=False)

    return write


def by_tracing(net, x):
    file = io.BytesIO()
    names = {"input_names": ["input"], "dynamic_axes": {"input": {0: "rows"}}}
    torch.onnx.export(net, (x,), file, dynamo=False, **names)
    return file.getvalue()


WAYS = {
    "module": from_module,
    "program": from_program(strict=False),
    "strict program": from_program(strict=True),
    "tracing": by_tracing,
}


def written(net, x, way="module"):
    """The bytes of the ONNX file."""
    result = WAYS[way](net, x)
    return result if isinstance(result, bytes) else result.model_proto.SerializeToString()


def node_types(data):
    """The number of nodes of each type. All belong to ONNX's own domain."""
    model = onnx.load_from_string(data)
    assert [opset.domain for opset in model.opset_import] == [""]
    assert not model.functions
    assert {node.domain for node in model.graph.node} <= {""}
    return Counter(node.op_type for node in model.graph.node)


def assert_computes(data, net, *shapes):
    session = onnxruntime.InferenceSession(data)
    for shape in shapes:
        x = integers(*shape)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        support.assert_same(torch.from_numpy(y), net(x).detach())


@pytest.mark.parametrize(
    ("way", "activation"),
    [("module", None), ("program", "tanh"), ("strict program", "sigmoid"), ("tracing", "relu")],
)
def test_gemm_and_relu(way, activation):
    net = made(ReluMLP(3, [6, 4], 2, output_activation=activation))
    data = written(net, integers(4, 3), way)
    last = [activation.capitalize()] if activation else []
    assert node_types(data) == Counter(["Gemm", "Relu", "Gemm", "Relu", "Gemm", *last])
    assert_computes(data, net, (50, 3), (1, 3), (0, 3))


@pytest.mark.parametrize("way", ["module", "tracing"])
def test_backends(way, backend):
    """No ONNX runtime has the operator, so a file never contains it."""
    net = made(ReluMLP(3, [6, 4], 2))
    data = written(net, integers(4, 3), way)
    assert node_types(data) == {"Gemm": 3, "Relu": 2}
    assert_computes(data, net, (5, 3))


def test_a_program_with_the_operator(backend):
    net = made(ReluMLP(3, [6, 4], 2))
    program = torch.export.export(net, (integers(4, 3),), dynamic_shapes=({0: ROWS},))
    operators = {torch.ops.relu_mlp.relu_mlp.default: reference.relu_mlp}
    program = program.run_decompositions(operators)
    file = torch.onnx.export(program, dynamo=True, verbose=False)
    data = file.model_proto.SerializeToString()
    assert node_types(data) == {"Gemm": 3, "Relu": 2}
    assert_computes(data, net, (5, 3))


def test_leading_dimensions_and_a_missing_bias():
    net = made(ReluMLP(3, [6, 4], 2))
    net[2].bias = None
    data = written(net, integers(4, 2, 3))
    types = node_types(data)
    assert types["Relu"] == 2
    assert types["Gemm"] + types["MatMul"] == 3
    assert set(types) <= {"Gemm", "MatMul", "Add", "Relu", "Reshape", "Shape", "Concat"}
    assert_computes(data, net, (5, 2, 3), (1, 2, 3))


class Model(nn.Module):
    """Layers, a layer made by `fuse`, and the functional form."""

    def __init__(self):
        super().__init__()
        layers = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Identity(), ReluMLP(5, [6], 3)]
        self.layers = support.integers_(fuse(nn.Sequential(*layers)))
        weights, biases = support.integer_network([3, 6, 2], dtype=torch.float32)
        self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList(biases)

    def forward(self, input):
        x = self.layers(input)
        return relu_mlp.relu_mlp(x, list(self.weights), list(self.biases))


def test_model():
    model = Model().eval()
    data = written(model, integers(4, 3))
    assert node_types(data) == {"Gemm": 6, "Relu": 3}
    assert_computes(data, model, (5, 3))
