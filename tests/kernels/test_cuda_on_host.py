"""The CUDA operators, from PyTorch's tensors through the plan, the kernels and cuBLASLt, run on the
host: against the reference, and against float64 with bounds.

The host's compiler compiles the sources of csrc/cuda, with an emulator for the GPU and a stand-in
for cuBLASLt (tests/cuda_on_host). They are registered as relu_mlp_cuda_on_host for CPU tensors.
PyTorch computes the products that do not go to cuBLASLt. Nothing here shows that the kernels run on
a GPU, or how fast.
"""

import ctypes
import functools
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import support
from relu_mlp import ops, reference
from relu_mlp.ops.backend import LOSSES_ON_CUDA
from support import passes
from support.passes import integer_network, kept_of

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "c++").split()[0]
SOURCES = [
    "csrc/cuda/plan.cpp",
    "csrc/cuda/layered/cublaslt.cpp",
    "csrc/cuda/passes.cpp",
    "csrc/cuda/layered/kernels.cu",
    "csrc/cuda/fused/fused.cu",
    "tests/cuda_on_host/emulator.cpp",
    "tests/cuda_on_host/operators.cpp",
]
H200, A100 = [132, 232448, 233472], [108, 166912, 167936]
ACTIVATIONS = list(reference.ACTIVATIONS)
#: Widths, by the code path that they test.
SIZES = {
    "fused": [5, 7, 6, 3],
    "aligned": [136, 8, 16],
    "hidden-aligned": [8, 136, 24, 8],
    "ragged": [130, 9, 5],
    "one-ragged-layer": [16, 136, 1],
    "one-layer": [136, 16],
    "width-1": [1, 200, 1],
    "no-hidden-units": [3, 0, 200],
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / SOURCES[0]).exists(), reason="needs the sources"),
    pytest.mark.skipif(not shutil.which(COMPILER), reason="needs a C++ compiler"),
]
every_dtype = pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
#: The operators themselves have no other losses on a GPU.
compare = functools.partial(passes.compare, losses=LOSSES_ON_CUDA)
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


# -- The library ----------------------------------------------------------------


def compile_all(folder):
    """operators.so and cublaslt.so in `folder`, from csrc/cuda and tests/cuda_on_host."""
    flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-fvisibility=hidden"]
    flags += ["-U_FORTIFY_SOURCE"]  # it mistakes a fiber's longjmp for an error
    flags += ["-DRELU_MLP_CUDA_ON_HOST", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += ['-DRELU_MLP_CUBLASLT=getenv("RELU_MLP_STAND_IN")']
    include = [ROOT, ROOT / "tests" / "cuda_on_host", *cpp_extension.include_paths()]
    flags += [f"-I{path}" for path in include]
    lib = Path(torch.__file__).parent / "lib"
    link = ["-x", "none", f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]

    def run(*command):
        subprocess.run([COMPILER, *flags, *command], cwd=ROOT, check=True)

    run("tests/cuda_on_host/cublaslt.cpp", *link, "-o", folder / "cublaslt.so")
    run("-x", "c++", *SOURCES, *link, "-o", folder / "operators.so")


@pytest.fixture(scope="module")
def built(made_once):
    """The folder with the libraries."""
    return made_once("cuda_on_host", compile_all)


class StandIn(ctypes.Structure):
    """The settings and counts of the stand-in for cuBLASLt: `Settings` in cublaslt.cpp."""

    _fields_ = [
        ("relu_passes_nan", ctypes.c_bool),
        ("has_gradient_of_b", ctypes.c_bool),
        ("fails", ctypes.c_int),
        ("products", ctypes.c_int64 * 1024),
        ("heuristics", ctypes.c_int64),
        ("objects", ctypes.c_int64),
    ]

    NONE, RELU, BIAS, RELU_BIAS, GRADIENT_OF_B = 1, 2, 4, 6, 512

    def counted(self):
        """The number of products so far, by epilogue."""
        return {n: count for n, count in enumerate(self.products) if count}


def stand_in_of(folder):
    library = ctypes.CDLL(str(folder / "cublaslt.so"))
    library.relu_mlp_stand_in.restype = ctypes.POINTER(StandIn)
    return library.relu_mlp_stand_in().contents


@pytest.fixture
def stand_in(built):
    settings = stand_in_of(built)
    ctypes.memset(settings.products, 0, ctypes.sizeof(settings.products))
    yield settings
    settings.fails, settings.has_gradient_of_b = 0, True


@pytest.fixture
def cuda(built, monkeypatch):
    """The operators. Memory that PyTorch allocates is filled with NaNs."""
    monkeypatch.setenv("RELU_MLP_STAND_IN", str(built / "cublaslt.so"))
    torch.ops.load_library(built / "operators.so")
    operators = torch.ops.relu_mlp_cuda_on_host
    operators.set_machine(0, H200)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield operators
    torch.use_deterministic_algorithms(was)


# -- Values -----------------------------------------------------------------------


@every_size
@every_dtype
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_exact(cuda, dtype, sizes, rows):
    """Sums of small integers are exact in every order: the bits of the reference."""
    compare(cuda, integer_network(sizes, dtype, rows), "none")


@every_dtype
@pytest.mark.parametrize("bias", ["none", "some"])
@pytest.mark.parametrize("sizes", [SIZES["fused"], SIZES["hidden-aligned"]], ids=str)
def test_exact_without_biases_through_relu(cuda, dtype, sizes, bias):
    compare(cuda, integer_network(sizes, dtype, 33, bias), "relu")


@every_dtype
def test_sums_over_many_chunks(cuda, dtype):
    """So many rows that several blocks share a column. A second kernel adds their sums."""
    cuda.set_machine(3, [4, *H200[1:]])
    x, weights, biases, grad_output = integer_network([136, 8, 8], dtype, 1500)
    x, grad_output = x * (torch.rand(x.shape) < 0.02), grad_output * (torch.rand(1500, 1) < 0.1)
    compare(cuda, (x.to(dtype), weights, biases, grad_output.to(dtype)), "none")


@every_dtype
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize(
    "sizes",
    [[8, 520, 16], [8, 300, 8], [5, 389, 3], [5, 264, 3, 2], [2, 4, 264, 8], [136, 300, 1]],
    ids=str,
)
def test_the_lowest_layers_a_few_columns_at_a_time(cuda, dtype, rows, sizes):
    """A device so small that 128 columns occupy it."""
    cuda.set_machine(0, [1, *H200[1:]])
    compare(cuda, integer_network(sizes, dtype, rows), "none")
    compare(cuda, integer_network(sizes, dtype, rows, "some"), "relu")


def peak_bytes(call):
    """The peak of a call's memory in tensors."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


def test_what_a_backward_pass_takes(cuda):
    """No activation and no delta exists whole: 4 and 16 parts of 512 columns and 128."""
    cuda.set_machine(0, [1, *H200[1:]])
    sizes, rows = [8, 2048, 16], 256
    x, weights, biases, grad_output = integer_network(sizes, torch.float32, rows)
    y, hidden = cuda.forward(x, weights, biases, "none", True)
    saved = kept_of(x, y, weights, hidden, "none", "01111")
    of_a_column, results = 4 * rows, 4 * sum(p.numel() for p in (*weights, *biases))
    for columns, call in {
        512: lambda: cuda.backward(grad_output, saved, "none", "01111"),
        2 * 128: lambda: cuda.recompute_backward(grad_output, x, weights, biases, "none", "01111"),
    }.items():
        taken = peak_bytes(call) - results
        assert 0 <= taken - columns * of_a_column < 32 * of_a_column  # the sums of chunks of rows


@every_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [[6, 9, 4], [136, 16, 8], [131, 5, 3]], ids=str)
def test_within_the_bounds_of_rounding(cuda, dtype, sizes, activation):
    torch.manual_seed(0)
    weights, biases = support.make_network(sizes, dtype=dtype)
    x = torch.randn(40, sizes[0], dtype=torch.float64).to(dtype)
    grad_output = torch.randn(40, sizes[-1], dtype=torch.float64).to(dtype)
    y, hidden = cuda.forward(x, weights, biases, activation, True)
    name = None if activation == "none" else activation
    exact = support.Exact(x, weights, biases, name, hidden, y)
    exact.y.check(y, "y")
    expected = exact.backward(grad_output)
    needs = "1" * (1 + 2 * len(weights))
    saved = kept_of(x, y, weights, hidden, activation, needs)
    names = ["x", *(f"{kind}[{n}]" for kind in ("weights", "biases") for n in range(len(weights)))]
    for found in (
        cuda.backward(grad_output, saved, activation, needs),
        cuda.recompute_backward(grad_output, x, weights, biases, activation, needs),
    ):
        for name, gradient in zip(names, found, strict=True):
            expected[name].check(gradient, name)


def strided(tensor, how):
    """The same values with other strides."""
    if how == "columns":
        return tensor.T.contiguous().T
    if how == "gaps":
        wide = torch.full((tensor.shape[0], tensor.shape[1] + 3), torch.nan, dtype=tensor.dtype)
        wide[:, : tensor.shape[1]] = tensor
        return wide[:, : tensor.shape[1]]
    if how == "odd-address":
        flat = torch.full((tensor.numel() + 1,), torch.nan, dtype=tensor.dtype)
        flat[1:] = tensor.flatten()
        return flat[1:].view(tensor.shape)
    assert how == "stride-0"
    return tensor[:1].expand(tensor.shape)


@every_dtype
@pytest.mark.parametrize("how", ["columns", "gaps", "odd-address", "stride-0"])
@pytest.mark.parametrize("sizes", [[6, 9, 4], [136, 16, 8]], ids=str)
def test_strides(cuda, dtype, sizes, how):
    x, weights, biases, grad_output = integer_network(sizes, dtype, 20)
    weights = [w if how == "stride-0" else strided(w, how) for w in weights]
    network = strided(x, how), weights, biases, strided(grad_output, how)
    compare(cuda, network, "none")
    compare(cuda, network, "relu")


@every_dtype
def test_hidden_activations_at_an_odd_address(cuda, dtype):
    x, weights, biases, grad_output = integer_network([6, 136, 8], dtype, 20)
    y, hidden = reference.forward(x, weights, biases, "none", True)
    saved = kept_of(x, y, weights, hidden, "none", "11111")
    expected = reference.backward(grad_output, saved, "none", "11111")
    saved[-1] = strided(saved[-1], "odd-address")
    found = cuda.backward(grad_output, saved, "none", "11111")
    support.assert_same(dict(enumerate(found)), dict(enumerate(expected)))


def test_leading_dimensions(cuda):
    x, weights, biases, grad_output = integer_network([6, 9, 4], torch.float32, 24)
    compare(cuda, (x.view(2, 3, 4, 6), weights, biases, grad_output.view(2, 3, 4, 4)), "relu")
    compare(cuda, (x[0], weights, biases, grad_output[0]), "relu")


@every_dtype
@pytest.mark.parametrize("sizes", [[6, 9, 4], [136, 16, 8], [131, 5, 3]], ids=str)
def test_what_is_not_finite(cuda, dtype, sizes):
    """ReLU passes NaN. The mask selects: an infinite gradient becomes 0 at a unit that is off."""
    x, weights, biases, grad_output = integer_network(sizes, dtype, 12)
    x[3, 2], x[5, 1] = torch.nan, torch.inf
    grad_output[7, 1], grad_output[8, 0] = torch.inf, torch.nan
    compare(cuda, (x, weights, biases, grad_output), "none")
    compare(cuda, (x, weights, biases, grad_output), "relu")


@every_dtype
@pytest.mark.parametrize("sizes", [[6, 9, 4], [136, 16, 8]], ids=str)
def test_the_same_bits_in_every_order_of_execution(cuda, dtype, sizes):
    torch.manual_seed(0)
    weights, biases = support.make_network(sizes, dtype=dtype)
    x, target = torch.randn(300, sizes[0]).to(dtype), torch.randn(300, sizes[-1]).to(dtype)
    found = []
    for seed in range(4):
        cuda.set_machine(seed, [2, *H200[1:]])
        loss, gradients = cuda.loss_and_grads(x, target, weights, biases, "sse", "tanh")
        found.append(dict(enumerate([loss, *gradients])))
    for other in found[1:]:
        support.assert_same(other, found[0])


# -- cuBLASLt ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_cublaslt_is_asked_for(cuda, stand_in, dtype):
    x, weights, biases, grad_output = integer_network([144, 24, 16], dtype, 70)
    arguments = x, weights, biases, "none", True
    cuda.forward(*arguments)  # the first call tests what the ReLU epilogue does to NaN
    before = stand_in.counted()
    y, hidden = cuda.forward(*arguments)
    after = stand_in.counted()
    new = {n: after[n] - before.get(n, 0) for n in after}
    assert new[stand_in.RELU_BIAS] == new[stand_in.BIAS] == 1
    assert new.get(stand_in.RELU, 0) == new.get(stand_in.NONE, 0) == 0
    cuda.backward(grad_output, kept_of(x, y, weights, hidden, "none", "11111"), "none", "11111")
    assert stand_in.products[stand_in.GRADIENT_OF_B] == 1  # that of the last layer
    # the other weight's gradient, and those of both inputs
    assert stand_in.products[stand_in.NONE] == 3


def test_algorithms_are_kept_and_objects_ended(cuda, stand_in):
    """One choice for each of the two products and each alignment (the host's memory has three: 64,
    128 and 256 bytes), with three layouts each. Nothing else is kept.
    """
    x, weights, biases, _ = integer_network([152, 24, 16], torch.bfloat16, 70)
    cuda.forward(x, weights, biases, "none", True)
    asked, objects = stand_in.heuristics, stand_in.objects
    for _ in range(20):
        cuda.forward(x, weights, biases, "none", True)
    assert stand_in.heuristics <= asked + 2 * 3
    assert stand_in.objects - objects == 3 * (stand_in.heuristics - asked)
    asked = stand_in.heuristics
    cuda.forward(x[:69], weights, biases, "none", True)
    assert stand_in.heuristics == asked + 2


def test_an_epilogue_that_is_not_supported(cuda, stand_in):
    stand_in.has_gradient_of_b = False
    compare(cuda, integer_network([168, 24, 32], torch.bfloat16, 70), "none")
    assert stand_in.products[stand_in.GRADIENT_OF_B] == 0


def test_a_failure_names_the_call(cuda, stand_in):
    x, weights, biases, _ = integer_network([144, 24, 16], torch.bfloat16, 70)
    stand_in.fails = 7
    with pytest.raises(RuntimeError, match="cublasLtMatmul: CUBLAS_STATUS_INVALID_VALUE"):
        cuda.forward(x, weights, biases, "none", True)


IN_ANOTHER_PROCESS = """
import pathlib, sys, torch
sys.path[:0] = [{tests!r}, {package!r}]
from kernels import test_cuda_on_host as t
folder = pathlib.Path({folder!r})
if {passes_nan} is not None:
    t.stand_in_of(folder).relu_passes_nan = {passes_nan}
torch.ops.load_library(folder / "operators.so")
x, weights, biases, grad_output = t.integer_network([136, 16, 8], torch.bfloat16, 12)
x[3, 2] = torch.nan
t.compare(torch.ops.relu_mlp_cuda_on_host, (x, weights, biases, grad_output), "relu")
print(t.stand_in_of(folder).counted())
"""


@pytest.mark.parametrize("passes_nan", [False, None], ids=["drops-nan", "no-library"])
def test_other_libraries(built, passes_nan):
    """A ReLU epilogue that turns NaN into 0 is not used. Without cuBLASLt, PyTorch serves all."""
    folder, tests = str(built), str(ROOT / "tests")
    package = str(Path(ops.__file__).parent.parent)
    values = {"folder": folder, "tests": tests, "package": package, "passes_nan": passes_nan}
    environment = {k: v for k, v in os.environ.items() if k != "RELU_MLP_STAND_IN"}
    if passes_nan is not None:
        environment["RELU_MLP_STAND_IN"] = str(built / "cublaslt.so")
    said = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS.format(**values)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    counted = eval(said.stdout)
    if passes_nan is None:
        assert counted == {}
    else:
        assert StandIn.RELU_BIAS not in counted and counted[StandIn.RELU] == 1
        assert counted[StandIn.BIAS] > 0


# -- Errors ----------------------------------------------------------------------------


def test_tensors_of_another_device(cuda):
    """With the messages of relu_mlp/checks.py."""
    x, weights, biases, grad_output = integer_network([6, 9, 4], torch.float32, 3)
    on_cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def call(name, *arguments):
        return getattr(cuda, name).default.redispatch(on_cpu, *arguments)

    elsewhere = weights[1].to("meta")
    with pytest.raises(RuntimeError, match=r"^weights\[1\] must be on cpu like x, got meta$"):
        call("forward", x, [weights[0], elsewhere], biases, "none", True)
    with pytest.raises(RuntimeError, match=r"^biases\[0\] must be on cpu like x, got meta$"):
        call("forward", x, weights, [biases[0].to("meta"), biases[1]], "none", True)
    with pytest.raises(RuntimeError, match=r"^grad_output must be on cpu like x, got meta$"):
        network = x, weights, biases
        call("recompute_backward", grad_output.to("meta"), *network, "none", "11111")
    with pytest.raises(RuntimeError, match=r"^target must be on cpu like x, got meta$"):
        call("loss_and_grads", x, grad_output.to("meta"), weights, biases, "sse", "none")
    with pytest.raises(RuntimeError, match=r"saved\[1\] must be on cpu like grad_output, got meta"):
        saved = [x, elsewhere, torch.relu(x @ weights[0].T)]
        call("backward", grad_output, saved, "none", "01111")
