"""Graphs that Inductor writes in C++: packages of AOTInductor, and `cpp_wrapper`.

There, C++ calls the operators. A package holds a lock during a call, and a thread that holds
Python's lock may be waiting for it. So no Python may run below such a call. And Inductor has no C++
for an operator that returns a tensor and a list.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import relu_mlp
from relu_mlp import ops
from support import assert_same, integers, integers_

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.skipif(ops.LIBRARY_PATH is None, reason="is about the library"),
]

#: The compiled code need not be fast, but it should compile fast.
QUICK = {
    "aot_inductor.precompile_headers": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "cpp_cache_precompile_headers": False,
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Makes Inductor compile little and cache nothing."""
    from torch._inductor import config, cpu_vec_isa  # takes seconds

    with pytest.MonkeyPatch.context() as patch, config.patch(QUICK):
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        # Inductor tries each instruction set of the processor with a compiler.
        patch.setattr(cpu_vec_isa, "valid_vec_isa_list", list)
        yield


@pytest.fixture
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Everything(nn.Module):
    """Calls every operator once."""

    def __init__(self):
        super().__init__()
        for name, shape in (("w0", (4, 3)), ("w1", (2, 4)), ("b0", (4,)), ("b1", (2,))):
            self.register_buffer(name, integers(*shape, dtype=torch.float32))

    def forward(self, x):
        call = torch.ops.relu_mlp
        weights, biases = [self.w0, self.w1], [self.b0, self.b1]
        y, hidden = call.forward(x, weights, biases, "relu", True)
        grads = call.backward(y, [x, y, self.w0, self.w1, *hidden], "relu", "11111")
        vjp = call.backward_vjp(
            y, [x, y, self.w0, self.w1, *hidden], "relu", "11111", grads[1:3], "01100", "1" * 6
        )
        again = call.recompute_backward(y, x, weights, biases, "relu", "11111")
        loss, of_parameters = call.loss_and_grads(x, y + 1, weights, biases, "sse", "none")
        z = call.relu_mlp(x, weights, biases)
        return (2 * y + 1, *grads, *vjp, *again, loss, *of_parameters, z.relu() + 1)


@pytest.fixture(scope="module")
def package(quick, tmp_path_factory):
    """The path of a package that calls every operator."""
    path = tmp_path_factory.mktemp("package") / "everything.pt2"
    torch.manual_seed(0)
    program = torch.export.export(Everything(), (torch.ones(5, 3),))
    return torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def test_a_package_computes_what_python_does(package):
    torch.manual_seed(0)
    model, x = Everything(), integers(5, 3, dtype=torch.float32)
    compiled = torch._inductor.aoti_load_package(package)
    expected = dict(enumerate(model(x)))
    assert_same(dict(enumerate(compiled(x))), expected)
    # PyTorch's products in a package ignore autocast.
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(dict(enumerate(compiled(x))), expected)


def test_no_python_runs_below_a_package(package):
    compiled = torch._inductor.aoti_load_package(package)
    folder = str(Path(relu_mlp.__file__).parent)
    ours = []

    def watch(frame, event, argument):
        if frame.f_code.co_filename.startswith(folder):
            ours.append(frame.f_code.co_name)

    sys.setprofile(watch)
    try:
        compiled(torch.ones(5, 3))
    finally:
        sys.setprofile(None)
    assert not ours


def test_threads_share_a_package(package):
    script = f"""
        import threading, torch, relu_mlp
        from torch._inductor import cpu_vec_isa
        cpu_vec_isa.valid_vec_isa_list = list  # or it tries them with a compiler
        model, x = torch._inductor.aoti_load_package({package!r}), torch.ones(5, 3)
        call = lambda: [model(x) for _ in range(1000)]
        threads = [threading.Thread(target=call) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    """
    root = str(Path(relu_mlp.__file__).parent.parent)
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": root},
        check=True,
        timeout=120,  # it takes a second after the imports, or hangs
    )


def step(model, x):
    """y, and the gradients of a loss with respect to x and every parameter."""
    leaf = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(leaf)
    y.square().sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    return dict(enumerate([y.detach(), leaf.grad, *grads]))


def test_a_training_step(quick, fresh):
    from torch._inductor import config

    net, x = integers_(relu_mlp.ReluMLP(3, [5], 2)), integers(4, 3, dtype=torch.float32)
    with config.patch(cpp_wrapper=True):
        assert_same(step(torch.compile(net), x), step(net, x))


@pytest.fixture
def graphs():
    """Runs Inductor up to the graphs that it would write, and returns the operators of each."""
    from torch._inductor.compile_fx import compile_fx

    kept = []

    def keep(graph_module, inputs, **options):
        calls = [node.target for node in graph_module.graph.nodes if node.op == "call_function"]
        kept.append([call for call in calls if getattr(call, "namespace", "") == "relu_mlp"])

        def run(arguments):
            return graph_module(*arguments)

        run._boxed_call = True
        return run

    keep.backend = lambda graph_module, inputs: compile_fx(graph_module, inputs, inner_compile=keep)
    keep.kept = kept
    return keep


def names(graphs):
    return [[str(call) for call in graph] for graph in graphs]


@pytest.mark.parametrize("activation", [None, "tanh"])
@pytest.mark.parametrize("recompute", [False, True])
def test_one_operator_each_way(graphs, fresh, activation, recompute):
    from torch._inductor import config

    arguments = {"output_activation": activation, "recompute": recompute}
    net = integers_(relu_mlp.ReluMLP(3, [5, 4], 2, **arguments))
    with config.patch(cpp_wrapper=True):
        compiled = torch.compile(net, backend=graphs.backend, fullgraph=True, dynamic=True)
        for rows in (4, 7):
            x = integers(rows, 3, dtype=torch.float32)
            assert_same(step(compiled, x), step(net, x))
        with torch.no_grad():
            assert torch.equal(compiled(x), net(x))
    assert names(graphs.kept) == [
        ["relu_mlp._forward_in_cpp.default"],
        ["relu_mlp._backward_in_cpp.default"],
        ["relu_mlp._relu_mlp_in_cpp.default"],
    ]


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_inductor_has_c_plus_plus_for_what_they_return(name):
    returned = getattr(torch.ops.relu_mlp, f"_{name}_in_cpp").default._schema.returns
    assert [str(value.type) for value in returned] in (["Tensor"], ["List[Tensor]"])


def test_elsewhere_the_public_operators_run(graphs, fresh):
    """Where Inductor writes Python, and where a compiler other than Inductor asks."""
    from torch._inductor import config

    net, x = integers_(relu_mlp.ReluMLP(3, [5], 2)), integers(4, 3, dtype=torch.float32)
    step(torch.compile(net, backend=graphs.backend), x)
    assert names(graphs.kept) == [["relu_mlp.forward.default"], ["relu_mlp.backward.default"]]
    arguments = (x, list(net.parameters())[::2], list(net.parameters())[1::2])
    with config.patch(cpp_wrapper=True), torch.no_grad():
        graph = torch.fx.experimental.proxy_tensor.make_fx(torch.ops.relu_mlp.relu_mlp)(*arguments)
    assert "relu_mlp.relu_mlp.default" in graph.code
