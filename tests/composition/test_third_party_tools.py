"""Third-party tools. Each gives the same result for a `ReluMLP`, for a module made by `fuse` and
for the functional form as for the `nn.Sequential`.

Tools that are too large for the `test` extra of pyproject.toml run where they are installed.
test_export.py and test_torchscript.py test without them what they rely on: programs and traces are
those of the `nn.Sequential`.
"""

import copy
import logging

import pytest
import torch
from torch import nn

import support
from relu_mlp import FusedSequential, ReluMLP, fuse, relu_mlp
from relu_mlp import backend as using

# Warnings of the tools, and of PyTorch about them.
pytestmark = [
    pytest.mark.slow,
    *(
        pytest.mark.filterwarnings(f"ignore::{kind}")
        for kind in ("DeprecationWarning", "FutureWarning", "UserWarning")
    ),
]


class Model(nn.Module):
    """A network by itself, a run in a longer `nn.Sequential`, and a Linear."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        net = ReluMLP(16, [32, 32], 8)
        self.net = net if kind == "ReluMLP" else nn.Sequential(*net)
        self.rest = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 4)
        if kind != "nn.Sequential":
            fuse(self)
            assert type(self.net) is ReluMLP and type(self.rest) is FusedSequential

    def forward(self, x):
        return self.head(self.rest(self.net(x)))


def made(kind):
    return Model(kind).eval()


def example(rows=4):
    torch.manual_seed(1)
    return torch.randn(rows, 16)


KINDS = pytest.mark.parametrize("kind", ["ReluMLP", "fused"])


def assert_alike(function, kind):
    """A tool's result is the same for the model as for its counterpart of `nn.Sequential`s."""
    with torch.no_grad():
        expected = function(made("nn.Sequential"))
        actual = function(made(kind))
    assert actual == expected
    assert expected  # so both are not empty


# -- Tracing by torch.fx, and what PyTorch builds on it ----------------------------------------


def nodes(graph):
    return [(node.op, node.name, node.target, node.format_node()) for node in graph.nodes]


@KINDS
def test_torch_fx(kind, backend):
    assert_alike(lambda model: nodes(torch.fx.symbolic_trace(model).graph), kind)


@pytest.mark.parametrize("output_activation", [None, "relu", "sigmoid", "tanh"])
def test_torch_fx_of_the_functional_form(output_activation, backend):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            weights, biases = support.integer_network([3, 6, 4, 2], "all", torch.float32)
            self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList(biases)

        def forward(self, x):
            biases = [self.biases[0], None, self.biases[2]]
            return relu_mlp(x, list(self.weights), biases, output_activation=output_activation)

    module = Functional()
    traced = torch.fx.symbolic_trace(module)
    linears = [node for node in traced.graph.nodes if node.target is nn.functional.linear]
    assert len(linears) == 3
    x = support.integers(5, 3).float()
    support.assert_same(traced(x), module(x))


@KINDS
def test_fx_graph_mode_quantization(kind):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    def quantized(model):
        prepared = prepare_fx(model, get_default_qconfig_mapping(), (example(),))
        prepared(example())
        converted = convert_fx(prepared)
        return converted(example()).tolist(), [str(n.target) for n in converted.graph.nodes]

    assert_alike(quantized, kind)


@KINDS
def test_quantize_dynamic(kind):
    from torch.ao.quantization import quantize_dynamic

    assert_alike(lambda model: quantize_dynamic(model, {nn.Linear})(example()).tolist(), kind)


# -- Exported programs ---------------------------------------------------------------------


@KINDS
def test_torchao_pt2e_quantization(kind, backend):
    logging.disable(logging.WARNING)  # parts of torchao that this PyTorch can't load
    try:
        pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
        x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    finally:
        logging.disable(logging.NOTSET)

    def quantized(model):
        if backend == "reference":
            program = torch.export.export(model, (example(),))
        else:
            with using("auto"):
                program = torch.export.export(model, (example(),))
        config = x86.get_default_x86_inductor_quantization_config()
        quantizer = x86.X86InductorQuantizer().set_global(config)
        prepared = pt2e.prepare_pt2e(program.module(), quantizer)
        prepared(example())
        converted = pt2e.convert_pt2e(prepared)
        targets = [str(node.target) for node in converted.graph.nodes]
        assert sum("quantize_per" in target for target in targets) > 12
        return converted(example()).tolist(), targets

    assert_alike(quantized, kind)


@KINDS
def test_executorch(kind):
    exir = pytest.importorskip("executorch.exir")
    runtime = pytest.importorskip("executorch.runtime")

    def computed(model):
        program = exir.to_edge(torch.export.export(model, (example(),))).to_executorch()
        method = runtime.Runtime.get().load_program(program.buffer).load_method("forward")
        return method.execute([example()])[0].tolist()

    assert_alike(computed, kind)


@KINDS
@pytest.mark.parametrize("way", ["trace", "export"])
def test_openvino(way, kind):
    openvino = pytest.importorskip("openvino")

    def computed(model):
        if way == "trace":
            converted = openvino.convert_model(model, example_input=example())
        else:
            converted = openvino.convert_model(torch.export.export(model, (example(),)))
        kinds = [operation.get_type_name() for operation in converted.get_ordered_ops()]
        assert kinds.count("MatMul") == 6
        y = openvino.compile_model(converted, "CPU")(example().numpy())[0]
        torch.testing.assert_close(torch.from_numpy(y), model(example()), rtol=0.05, atol=0.05)
        return kinds

    assert_alike(computed, kind)


@KINDS
@pytest.mark.parametrize("way", ["trace", "export"])
def test_coremltools(way, kind):
    coremltools = pytest.importorskip("coremltools")

    def operations(model):
        if way == "trace":
            inputs = [coremltools.TensorType(shape=example().shape)]
            converted = coremltools.convert(torch.jit.trace(model, example()), inputs=inputs)
        else:
            program = torch.export.export(model, (example(),)).run_decompositions({})
            converted = coremltools.convert(program)
        kinds = [op.op_type for op in converted._mil_program.functions["main"].operations]
        assert kinds.count("linear") == 6
        return kinds

    assert_alike(operations, kind)


# -- Counters ----------------------------------------------------------------------------


def by_torchprofile(model):
    return pytest.importorskip("torchprofile").profile_macs(model, example())


def by_ptflops(model):
    count = pytest.importorskip("ptflops").get_model_complexity_info
    options = {"as_strings": False, "print_per_layer_stat": False, "backend": "pytorch"}
    return count(model, (16,), **options)


def by_fvcore(model):
    return pytest.importorskip("fvcore.nn").FlopCountAnalysis(model, example()).total()


def by_thop(model):
    return pytest.importorskip("thop").profile(model, (example(),), verbose=False)


def by_torchinfo(model):
    summary = pytest.importorskip("torchinfo").summary(model, input_data=example(), verbose=0)
    layers = [(layer.var_name, layer.output_size, layer.macs) for layer in summary.summary_list]
    return summary.total_mult_adds, summary.total_params, layers


def by_flop_counter(model):
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(example())
    return counter.get_total_flops(), counter.get_flop_counts()["Model.net.0"]


COUNTERS = [by_flop_counter, by_torchprofile, by_ptflops, by_fvcore, by_thop, by_torchinfo]


@KINDS
@pytest.mark.parametrize("count", COUNTERS)
def test_counters(count, kind):
    assert_alike(count, kind)


@KINDS
def test_a_counter_leaves_the_model_as_it_was(kind):
    """Whatever the counter, the operators run afterwards."""
    model = made(kind)
    for count in COUNTERS:
        try:
            count(copy.deepcopy(model))
            count(model)
        except pytest.skip.Exception:
            continue
    with support.count_calls() as calls:
        model(example())
    assert calls["forward"] == 2
