"""The first import of the package may happen anywhere: in a transform, in a mode, under other
defaults or in another thread.
"""

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.installation]

# Every case is a child of one process that has loaded PyTorch and nothing else.
PROGRAM = """
import json, os, sys, threading, traceback, warnings
import torch
import torch._dynamo  # takes longer than all the cases
from torch import nn
from torch.func import functionalize, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

warnings.simplefilter("ignore")  # said of torch.jit by the first derivative in forward mode
torch.set_num_threads(1)
ONES = torch.ones(2, 2)
jvp(torch.sum, (ONES,), (ONES,))  # makes what every child would make


class Subclass(torch.Tensor):
    pass


def as_subclass(result):
    return result.as_subclass(Subclass) if type(result) is torch.Tensor else result


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return as_subclass(function(*args, **(kwargs or {})))


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return as_subclass(function(*args, **(kwargs or {})))


class Importing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        import relu_mlp
        return grad


def importing(x):
    import relu_mlp
    return x.sum()


def within(context):
    with context:
        import relu_mlp


def in_a_thread():
    thread = threading.Thread(target=importing, args=(ONES,))
    thread.start()
    thread.join()


def with_default_dtype():
    torch.set_default_dtype(torch.float64)
    import relu_mlp
    torch.set_default_dtype(torch.float32)


def with_default_device():
    torch.set_default_device("meta")
    import relu_mlp
    torch.set_default_device("cpu")


CASES = {
    "the top": lambda: importing(ONES),
    "grad": lambda: grad(importing)(ONES),
    "vmap": lambda: vmap(importing)(ONES),
    "jvp": lambda: jvp(importing, (ONES,), (ONES,)),
    "functionalize": lambda: functionalize(importing)(ONES),
    "a backward pass": lambda: Importing.apply(ONES.clone().requires_grad_()).sum().backward(),
    "make_fx": lambda: make_fx(importing)(ONES),
    "make_fx with symbols": lambda: make_fx(importing, tracing_mode="symbolic")(ONES),
    "torch.jit.trace": lambda: torch.jit.trace(importing, ONES),
    "torch.compile": lambda: torch.compile(importing, backend="eager")(ONES),
    "FakeTensorMode": lambda: within(FakeTensorMode()),
    "a function mode": lambda: within(FunctionMode()),
    "a dispatch mode": lambda: within(DispatchMode()),
    "forward mode": lambda: within(torch.autograd.forward_ad.dual_level()),
    "inference mode": lambda: within(torch.inference_mode()),
    "no_grad": lambda: within(torch.no_grad()),
    "autocast": lambda: within(torch.autocast("cpu")),
    "the meta device": lambda: within(torch.device("meta")),
    "a default device": with_default_device,
    "a default dtype": with_default_dtype,
    "a thread": in_a_thread,
}


def check():
    import relu_mlp
    from relu_mlp.ops import NO_TENSOR

    assert type(NO_TENSOR) is torch.Tensor, type(NO_TENSOR)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(NO_TENSOR)
    assert not NO_TENSOR.is_inference() and NO_TENSOR.dtype is torch.float32
    assert NO_TENSOR.device == torch.device("cpu")
    for activation in (None, "relu"):
        net = relu_mlp.ReluMLP(2, [3], 1, bias=False, output_activation=activation)
        x = torch.ones(1, 2, requires_grad=True)
        results = []
        for model in (net, nn.Sequential(*net)):
            (by_x,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            results.append(torch.autograd.grad(by_x.square().sum(), [*model.parameters()]))
        torch.testing.assert_close(*results)
    x, weights, biases = ONES, [torch.ones(3, 2), torch.ones(1, 3)], [torch.ones(3), None]
    relu_mlp.loss_and_grads(x, torch.ones(2, 1), weights, biases)
    assert relu_mlp.jacobian(x, weights, biases).biases[1] is None
    of_sum = lambda x: relu_mlp.relu_mlp(x, weights, biases).sum()
    torch.testing.assert_close(vmap(grad(of_sum))(x), torch.full((2, 2), 3.0))


for name, first in CASES.items():
    if os.fork() == 0:
        problem = None
        try:
            first()
            assert "relu_mlp" in sys.modules
            check()
        except BaseException:
            problem = traceback.format_exc()
        print(json.dumps([name, problem]), flush=True)
        os._exit(0)
    os.wait()
"""


def test_where_the_first_import_happens_does_not_matter():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    outcomes = dict(map(json.loads, result.stdout.splitlines()))
    assert len(outcomes) == 21
    assert not {name: problem for name, problem in outcomes.items() if problem}


LOADED = """
import sys
import torch
before = set(sys.modules)
import relu_mlp
print(*sorted(set(sys.modules) - before))
"""


def test_it_loads_no_compiler():
    """Dynamo and SymPy would take longer than everything else."""
    result = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True
    )
    loaded = result.stdout.split()
    assert "relu_mlp.modules" in loaded
    compilers = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch._export", "sympy")
    assert [name for name in loaded if name.startswith(compilers)] == []


def test_a_missing_numpy_is_not_mentioned(tmp_path):
    """PyTorch warns of it, also before the output of a command that needs no NumPy."""
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError(\"No module named 'numpy'\")")
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    said = subprocess.run(
        [sys.executable, "-m", "relu_mlp", "info"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stderr == ""
