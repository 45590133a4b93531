"""The fuzzer: some of its cases run, it finds deliberate defects, and it reports a case that
crashes or hangs like any other. Its findings in the reference are tested here too.
"""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import relu_mlp
from relu_mlp import ops

TOOLS = Path(__file__).parents[2] / "tools"

pytestmark = [
    pytest.mark.skipif(not TOOLS.exists(), reason="the tools are not beside the tests"),
    # PyTorch's warnings about layouts in beta, and the like.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
def fuzz(monkeypatch):
    """The fuzzer, as a package. It may choose an instruction set, which is undone."""
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the package adds this folder
    before = relu_mlp.build_info().instruction_set
    package = importlib.import_module("fuzz")
    importlib.import_module("fuzz.command_line")  # and with it all other modules
    yield package
    if package.case.INSTRUCTION_SETS:
        torch.ops.relu_mlp_testing.choose_instruction_set(before)


def run(code, *arguments):
    """Runs the fuzzer in a process of its own, after some code."""
    code = f"import sys; sys.path[:0] = [{str(TOOLS)!r}]\nfrom fuzz import command_line\n{code}\n"
    code += f"sys.exit(command_line.main({list(arguments)!r}))"
    environment = {"PYTHONPATH": str(Path(relu_mlp.__file__).parent.parent)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )


@pytest.mark.slow
def test_cases():
    """Cases of every kind, with two processes."""
    done = run("", "--seed", "tests", "--cases", "250", "--processes", "2")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "250 cases, 0 of them wrong" in done.stdout
    for kind in ("op_forward", "op_backward", "public_relu_mlp", "fuse"):
        assert f"{kind}, right" in done.stdout


def test_every_operator_has_a_kind_of_case(fuzz):
    written = {name for name in vars(fuzz.operators) if name.startswith("op_")}
    assert written <= {kind.__name__ for kind in fuzz.kinds.KINDS}
    # `op_forward` calls `relu_mlp` too
    assert written == {f"op_{name}" for name in ops.OPERATORS if name != "relu_mlp"}


def test_a_case_follows_from_seed_and_number(fuzz):
    def log(seed, number):
        case = fuzz.case.Case(seed, number)
        fuzz.network.Network(case)
        return case.log, case.r.random()

    assert log("a", 3) == log("a", 3)
    assert log("a", 3)[1] != log("a", 4)[1] != log("b", 4)[1]


# -- What is broken on purpose ---------------------------------------------------------


def last_number_off(answer):
    """The same with 1 added to the last number of the last nonempty tensor."""
    for tensor in reversed(torch.utils._pytree.tree_leaves(answer)):
        if tensor.numel():
            tensor.view(-1)[-1] += 1
            return answer
    return answer


def raises(error):
    def call(*arguments):
        raise error

    return call


def changes_an_argument(operator):
    def call(x, *arguments):
        answer = operator(x, *arguments)
        with torch.no_grad():
            if x.numel() and not x._is_zerotensor():
                x.untyped_storage()[0] = (x.untyped_storage()[0] + 1) % 256
        return answer

    return call


BREAKS = {
    "a wrong number": (lambda f: lambda *a: last_number_off(f(*a)), "numbers are wrong"),
    "another dtype": (lambda f: lambda *a: f(*a).to(torch.complex64), "should be"),
    "an argument changed": (changes_an_argument, "an argument was changed"),
    "a valid call refused": (lambda f: raises(RuntimeError("no")), "a valid call was refused"),
    "another exception": (lambda f: raises(KeyError("x")), "KeyError"),
    "an assertion": (lambda f: raises(AssertionError("x")), "AssertionError"),
}


@pytest.mark.parametrize("how", BREAKS)
def test_finds_what_is_broken(fuzz, monkeypatch, how):
    change, words = BREAKS[how]
    operator = torch.ops.relu_mlp.relu_mlp

    def small(case):
        net = fuzz.network.Network(case, [torch.float32], scale=0)
        exact = net.is_exact(torch.float32)
        return fuzz.operators.judge(case, "relu_mlp", [*net.operands(), net.name], True, exact)

    monkeypatch.setattr(fuzz.kinds, "KINDS", {small: 1})
    for number in range(20):
        assert fuzz.kinds.run_case("broken", number) == ("small", "right")
    monkeypatch.setattr(fuzz.operators, "OPERATORS", SimpleNamespace(relu_mlp=change(operator)))
    monkeypatch.setattr(fuzz.case, "INSTRUCTION_SETS", [])
    said = []
    for number in range(20):
        try:
            fuzz.kinds.run_case("broken", number)
        except fuzz.verdict.Wrong as error:
            said.append(str(error))
    assert any(words in text for text in said), said
    assert "case" in said[0] and "weights: [float32" in said[0]


def test_a_wrong_gradient_is_found(fuzz, monkeypatch):
    """A wrong gradient of the public function: in the bits, and for real numbers beyond bounds."""
    monkeypatch.setattr(fuzz.kinds, "KINDS", {fuzz.functions.public_relu_mlp: 1})

    def scaled(*arguments, **options):
        y = real(*arguments, **options)
        return y * 1.0 if not y.requires_grad else Scaled.apply(y)

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.25

    real = relu_mlp.relu_mlp
    monkeypatch.setattr(relu_mlp, "relu_mlp", scaled)
    said = []
    for number in range(60):
        try:
            fuzz.kinds.run_case("gradients", number)
        except fuzz.verdict.Wrong as error:
            said.append(str(error))
    assert any("numbers are wrong" in text for text in said)
    assert any("the gradient of" in text and "within" in text for text in said)


CRASHES = """
import os, signal, time
from fuzz import kinds
from fuzz.case import Case
def kind(case):
    number = int(case.log[0].split()[-1])
    if number == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 4:
        time.sleep(1000)
    return "right"
def run_case(seed, number):
    case = Case(seed, number)
    case.note("number", number)
    return "kind", kind(case)
kinds.run_case = run_case
"""


@pytest.mark.slow
def test_a_case_that_crashes_or_hangs_is_reported():
    done = run(CRASHES, "--seed", "s", "--cases", "9", "--patience", "5")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "case 3: the process ended with SIGSEGV" in done.stdout
    assert "case 4: the process ended with SIGABRT" in done.stdout
    assert "number: 4" in done.stdout  # the arguments of the case
    assert 'make fuzz ARGS="--seed s --case 3"' in done.stdout
    assert "9 cases, 2 of them wrong" in done.stdout


# -- What it has found --------------------------------------------------------------------

X, W, Y = torch.ones(3, 2), torch.ones(4, 2), torch.ones(3, 4)
BAD = {
    "saved too short": ("backward", Y, [X], "none", "110"),
    "saved too long": ("backward", Y, [X, X], "none", "010"),
    "needs too short": ("backward", Y, [X], "none", "01"),
    "needs of an even length": ("backward", Y, [X], "none", "0101"),
    "needs of other characters": ("backward", Y, [X], "none", "020"),
    "needs with a NUL": ("backward", Y, [X], "none", "01\0"),
    "an unknown activation": ("backward", Y, [X], "gelu", "010"),
    "a scalar gradient": ("backward", torch.ones(()), [X], "none", "010"),
    "y of other rows": ("backward", Y, [X, Y[:1]], "tanh", "010"),
    "x of other rows": ("backward", Y, [X[:1]], "none", "010"),
    "a weight of another width": ("backward", Y, [W[:3]], "none", "100"),
    "a weight of rank 3": ("backward", Y, [W[None]], "none", "100"),
    "a gradient of another dtype": ("backward", Y.double(), [X], "none", "010"),
    "no cotangent": ("backward_vjp", Y, [X], "none", "010", [], "1", "11"),
    "a cotangent of another shape": ("backward_vjp", Y, [X], "none", "010", [W.T], "1", "11"),
    "no gradient for backward_vjp": ("backward_vjp", None, [X], "none", "010", [W], "1", "11"),
    "given too long": ("backward_vjp", Y, [X], "none", "010", [W, W], "11", "11"),
    "wanted too short": ("backward_vjp", Y, [X], "none", "010", [W], "1", "1"),
    "needs for other layers": ("recompute_backward", Y, X, [W], [], "none", "01010"),
    "no x": ("relu_mlp", None, [W], [], "none"),
    "no x for forward": ("forward", None, [W], [], "none", True),
    "no gradient": ("backward", None, [X], "none", "010"),
    "no gradient and nothing saved": ("backward", None, [], "none", "001"),
    "no gradient for recompute_backward": ("recompute_backward", None, X, [W], [], "none", "010"),
    "no x for recompute_backward": ("recompute_backward", Y, None, [W], [], "none", "010"),
    "a gradient of integers": ("backward", Y.to(torch.int8), [], "none", "001"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_operators_refuse(backend, mode, what):
    name, *arguments = BAD[what]
    with (
        pytest.raises((RuntimeError, TypeError), match=r"must|asks for|no kernel|undefined"),
        mode(),
    ):
        getattr(torch.ops.relu_mlp, name)(*arguments)
