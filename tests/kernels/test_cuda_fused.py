"""CUDA's fused kernels, run on the host: values, memory, numbers that are not finite, order of
execution, plans and index arithmetic.

tests/cuda_on_host/emulator.h stands in for the GPU, and lists what it does not emulate. Nothing
here shows that the kernels run on a GPU, or how fast.
"""

import contextlib
import ctypes
import functools
import gc
import itertools
import mmap
import os
import random
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

import support
from relu_mlp import reference

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "c++").split()[0]
SOURCES = [
    "csrc/cuda/fused/fused.cu",
    "tests/cuda_on_host/fused.cpp",
    "tests/cuda_on_host/emulator.cpp",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / SOURCES[0]).exists(), reason="needs the sources"),
    pytest.mark.skipif(not shutil.which(COMPILER), reason="needs a C++ compiler"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PHIS = ["none", "relu", "sigmoid", "tanh"]
H200 = (132, 232448)
A100 = (108, 166912)


class Call(ctypes.Structure):
    """The same fields as in tests/cuda_on_host/fused.cpp."""

    _pointers = ctypes.c_void_p * 16
    _strides = ctypes.c_int64 * 2
    _fields_ = [
        ("element", ctypes.c_int64),
        ("layers", ctypes.c_int64),
        ("widths", ctypes.c_int64 * 17),
        ("activation", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("weights", _pointers),
        ("biases", _pointers),
        ("x", ctypes.c_void_p),
        ("x_strides", _strides),
        ("hidden", _pointers),
        ("y", ctypes.c_void_p),
        ("grad_output", ctypes.c_void_p),
        ("grad_strides", _strides),
        ("target", ctypes.c_void_p),
        ("loss_scale", ctypes.c_double),
        ("squares", ctypes.c_void_p),
        ("grad_x", ctypes.c_void_p),
        ("grad_weights", _pointers),
        ("grad_biases", _pointers),
        ("seed", ctypes.c_int64),
        ("multiprocessors", ctypes.c_int64),
        ("shared_bytes", ctypes.c_int64),
    ]


def compile_kernels(folder):
    flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-DRELU_MLP_CUDA_ON_HOST"]
    flags += ["-U_FORTIFY_SOURCE"]  # it mistakes a fiber's longjmp for an error
    include = [ROOT, ROOT / "tests" / "cuda_on_host", *cpp_extension.include_paths()]
    command = [COMPILER, *flags, *(f"-I{path}" for path in include), "-x", "c++", *SOURCES]
    subprocess.run([*command, "-o", folder / "fused.so"], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def library(made_once):
    library = ctypes.CDLL(str(made_once("cuda_fused", compile_kernels) / "fused.so"))
    for function in library.run_forward, library.run_backward, library.run_mistake:
        function.restype = ctypes.c_char_p
    for name, arguments in ("index_of_column", 2), ("offset_of_vector", 3), ("stride_of_floats", 1):
        function = getattr(library, name)
        function.restype = ctypes.c_int64
        function.argtypes = [ctypes.c_int64] * arguments
    library.launches.restype = ctypes.c_int64
    library.place_of_sum.argtypes = [ctypes.c_bool, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    library.plan.argtypes = [ctypes.c_void_p, ctypes.c_bool, ctypes.c_bool, ctypes.c_void_p]
    return library


# -- Memory ----------------------------------------------------------------------------


class Memory:
    """Device memory surrounded by NaNs, which no kernel may read or overwrite."""

    margin = 64

    def __init__(self):
        self.outputs = []

    def _allocate(self, count, dtype, offset):
        memory = torch.full((count + 2 * self.margin + offset,), torch.nan, dtype=dtype)
        aligned = -memory.data_ptr() % 16 // memory.element_size()
        return memory, aligned + 16 + offset

    def input(self, tensor, layout="contiguous"):
        """A copy of a tensor with another layout."""
        if layout == "one number" and tensor.numel():
            assert (tensor == tensor.flatten()[:1]).all()
            memory, start = self._allocate(1, tensor.dtype, 1)
            view = memory[start : start + 1].as_strided(tensor.shape, (0, 0), start)
            memory[start] = tensor.flatten()[0]
            return view
        columns = tensor.shape[-1]
        strides, offset = {
            "contiguous": ((columns, 1), 0),
            "not aligned": ((columns, 1), 1),
            "wide rows": ((columns + 8 - columns % 8, 1), 0),
            "odd rows": ((columns + 3, 1), 0),
            "transposed": ((1, tensor.shape[0] + 1), 0),
            "every other": ((2 * columns, 2), 0),
        }.get(layout, ((0, 0), 0))
        strides = strides if tensor.dim() == 2 else (1,)
        extent = sum(s * (n - 1) for s, n in zip(strides, tensor.shape)) + 1
        memory, start = self._allocate(max(1, extent), tensor.dtype, offset)
        view = memory.as_strided(tensor.shape, strides, start)
        view.copy_(tensor)
        return view

    def output(self, *shape, dtype, offset=0):
        count = torch.Size(shape).numel()
        memory, start = self._allocate(count, dtype, offset)
        self.outputs.append((memory, start, count))
        return memory[start : start + count].view(shape)

    def check(self):
        for memory, start, count in self.outputs:
            assert memory[:start].isnan().all() and memory[start + count :].isnan().all(), (
                "a write outside of a result"
            )


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def pointers(tensors):
    return Call._pointers(*map(address, tensors))


def new_call(network, rows, seed=0, device=H200):
    weights = network.weights
    return Call(
        element=DTYPES.index(weights[0].dtype),
        layers=len(weights),
        widths=(ctypes.c_int64 * 17)(weights[0].shape[1], *(len(w) for w in weights)),
        activation=PHIS.index(network.phi),
        rows=rows,
        weights=pointers(weights),
        biases=pointers(network.biases),
        seed=seed,
        multiprocessors=device[0],
        shared_bytes=device[1],
    )


def plan(library, network, rows, is_backward, recompute=False, device=H200):
    call = new_call(network, rows, device=device)
    values = (ctypes.c_int64 * 7)()
    library.plan(ctypes.byref(call), is_backward, recompute, values)
    names = ["serves", "threads", "tile_rows", "grid", "sum_floats", "shared", "workspace"]
    return SimpleNamespace(**dict(zip(names, values)))


def run(function, call):
    error = function(ctypes.byref(call))
    assert error is None, error.decode()


# -- Networks of small integers, and their results ---------------------------------------


def integer_network(widths, phi, dtype, bias="all", seed=0, density=3.0):
    """Weights and biases of -1, 0 and 1, few of them different from 0."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape, density=1.0):
        signs = torch.randint(-1, 2, shape, generator=generator)
        return (signs * (torch.rand(shape, generator=generator) < density)).to(dtype)

    pairs = list(zip(widths, widths[1:]))
    return SimpleNamespace(
        phi=phi,
        weights=[
            integers(n_out, n_in, density=density / max(n_in, n_out)) for n_in, n_out in pairs
        ],
        biases=[
            None if bias == "none" or (bias == "some" and layer % 2 == 0) else integers(n_out)
            for layer, (_, n_out) in enumerate(pairs)
        ],
        integers=integers,
    )


def exact_results(network, x, grad_output, dtype, target=None):
    """The formulas of reference.py in float64, rounded to dtype where results are stored.

    All sums are of integers below 2^24, which float32 adds without rounding. With a target, the
    gradients are those of half the sum of squares.
    """

    def stored(tensor):
        return tensor.to(dtype).double()

    def product(a, b):
        finite = a.nan_to_num(0, 0, 0).abs() @ b.nan_to_num(0, 0, 0).abs()
        assert not finite.numel() or finite.max() < 2**24, "the test's numbers are too large"
        return a @ b

    weights = [w.double() for w in network.weights]
    a = [x.double()]
    for weight, bias in zip(weights, network.biases):
        z = product(a[-1], weight.T) + (0 if bias is None else bias.double())
        a.append(stored(torch.relu(z)))
    y = stored(reference.ACTIVATIONS[network.phi](z))
    results = {"y": y} | {f"hidden {layer}": hidden for layer, hidden in enumerate(a[1:-1])}
    grad = grad_output.double() if target is None else y - target.double()
    delta = stored(reference.ACTIVATION_BACKWARDS[network.phi](grad, y))
    for layer in reversed(range(len(weights))):
        results[f"weight {layer}"] = stored(product(delta.T, a[layer]))
        results[f"bias {layer}"] = stored(delta.sum(0))
        delta = stored(product(delta, weights[layer]))
        if layer:
            delta = reference.select(delta, a[layer])
    results["x"] = delta
    return results


def check_equal(found, results, dtype):
    for name, tensor in found.items():
        expected = results[name].to(dtype)
        same = (tensor == expected) | (tensor.isnan() & expected.isnan())
        assert tensor.shape == expected.shape and same.all(), (
            f"{name}: {(~same).sum()} of {same.numel()} differ, the first at "
            f"{(~same).nonzero()[0].tolist()}: {tensor[~same][0]} should be {expected[~same][0]}"
        )


def check_bounds(found, bounds):
    for name, tensor in found.items():
        kind, _, layer = name.partition(" ")
        key = {"x": "x", "weight": f"weights[{layer}]", "bias": f"biases[{layer}]"}[kind]
        bounds[key].check(tensor, key)


# -- The two passes ----------------------------------------------------------------------


def forward(library, network, x, keep=True, layout="contiguous", offset=0, **options):
    """y and the hidden activations, by name."""
    memory, dtype = Memory(), x.dtype
    call = new_call(network, len(x), **options)
    given = memory.input(x, layout)
    call.x, call.x_strides = given.data_ptr(), Call._strides(*given.stride())
    y = memory.output(len(x), call.widths[call.layers], dtype=dtype, offset=offset)
    call.y = y.data_ptr()
    hidden = [
        memory.output(len(x), len(weight), dtype=dtype, offset=offset) if keep else None
        for weight in network.weights[:-1]
    ]
    call.hidden = pointers(hidden)
    run(library.run_forward, call)
    memory.check()
    found = {"y": y}
    return found | {f"hidden {layer}": a for layer, a in enumerate(hidden) if keep}


def backward(
    library,
    network,
    x,
    needs,
    grad_output=None,
    saved=None,
    target=None,
    loss_scale=1.0,
    layouts=("contiguous", "contiguous"),
    offset=0,
    **options,
):
    """The gradients that `needs` requests, by name; from `saved`, or recomputed without it."""
    memory, dtype, layers = Memory(), x.dtype, len(network.weights)
    call = new_call(network, len(x), **options)
    kept = [True] * (2 + 2 * layers)
    if saved is not None:
        kept = reference.is_kept(network.phi, needs)
        weights = [w if k else None for w, k in zip(network.weights, kept[2:])]
        call.weights = pointers(weights)
        call.biases = pointers([None] * layers)
        y = memory.input(saved["y"].to(dtype)) if kept[1] else None
        call.y = address(y)
        hidden = [
            memory.input(saved[f"hidden {layer}"].to(dtype)) if k else None
            for layer, k in enumerate(kept[2 + layers :])
        ]
        call.hidden = pointers(hidden)
    if kept[0]:
        given = memory.input(x, layouts[0])
        call.x, call.x_strides = given.data_ptr(), Call._strides(*given.stride())
    if target is None:
        grad = memory.input(grad_output, layouts[1])
        call.grad_output, call.grad_strides = grad.data_ptr(), Call._strides(*grad.stride())
    else:
        to = memory.input(target)
        squares = memory.output(1, dtype=torch.float64)
        call.target, call.loss_scale, call.squares = to.data_ptr(), loss_scale, squares.data_ptr()
    shapes = {"x": x.shape}
    shapes |= {f"weight {layer}": weight.shape for layer, weight in enumerate(network.weights)}
    shapes |= {f"bias {layer}": weight.shape[:1] for layer, weight in enumerate(network.weights)}
    found = {
        name: memory.output(*shape, dtype=dtype, offset=offset)
        for (name, shape), need in zip(shapes.items(), needs)
        if need == "1"
    }
    call.grad_x = address(found.get("x"))
    call.grad_weights = pointers([found.get(f"weight {layer}") for layer in range(layers)])
    call.grad_biases = pointers([found.get(f"bias {layer}") for layer in range(layers)])
    run(library.run_backward, call)
    memory.check()
    return found | ({} if target is None else {"squares": squares})


# -- Values ------------------------------------------------------------------------------

# On both sides of the edges of a vector, a tile, a group and the padded widths.
WIDTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 100, 127, 128]
ROWS = [1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 65, 100, 127, 128, 129, 257, 300]
X_LAYOUTS = ["contiguous", "not aligned", "wide rows", "odd rows", "transposed", "every other"]


@functools.cache
def exact_case(seed, dtype):
    """A network, its input and a gradient, and their layouts, all determined by the seed."""
    r = random.Random(f"{seed} {dtype}")
    while True:
        layers = r.randint(1, 5)
        widths = r.choices(WIDTHS, k=layers + 1)
        rows = r.choice(ROWS)
        if rows * sum(widths) < 40_000 and sum(a * b for a, b in zip(widths, widths[1:])) < 12_000:
            break
    network = integer_network(
        widths, r.choice(["none", "relu"]), dtype, r.choice(["all", "some", "none"]), seed
    )
    x, grad = network.integers(rows, widths[0]), network.integers(rows, widths[-1])
    grad_layout = r.choice([*X_LAYOUTS, "one number"])
    if grad_layout == "one number":
        grad = torch.ones_like(grad)
    return SimpleNamespace(
        network=network,
        x=x,
        grad=grad,
        needs="".join(r.choices("01", weights=(1, 2), k=1 + 2 * layers)),
        layouts=(r.choice(X_LAYOUTS), grad_layout),
        # Few multiprocessors, so each block gets several tiles.
        options={
            "offset": r.choice([0, 0, 1]),
            "seed": seed,
            "device": (r.choice([1, 2, 132]), H200[1]),
        },
    )


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
@pytest.mark.parametrize("seed", range(24))
def test_integers_are_exact(library, seed, dtype):
    case = exact_case(seed, dtype)
    network, x = case.network, case.x
    results = exact_results(network, x, case.grad, dtype)
    found = forward(library, network, x, layout=case.layouts[0], **case.options)
    check_equal(found, results, dtype)
    y = forward(library, network, x, keep=False, layout=case.layouts[0], **case.options)
    check_equal(y, results, dtype)

    for saved in (results, None):
        if not plan(library, network, len(x), True, saved is None).serves:
            continue
        grads = backward(
            library, network, x, case.needs, case.grad, saved, layouts=case.layouts, **case.options
        )
        assert len(grads) == case.needs.count("1")
        check_equal(grads, results, dtype)

        target = case.grad
        by_loss = exact_results(network, x, None, dtype, target=target)
        if saved is None:
            grads = backward(
                library, network, x, case.needs, target=target, loss_scale=0.5, **case.options
            )
            squares = (by_loss["y"] - target.double()).square().sum()
            assert grads.pop("squares").item() == squares.item()
            check_equal(grads, by_loss, dtype)


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_choice_of_gradients(library, dtype, recompute):
    network = integer_network([5, 9, 34], "relu", dtype)
    x, grad = network.integers(19, 5), network.integers(19, 34)
    results = exact_results(network, x, grad, dtype)
    for needs in map("".join, itertools.product("01", repeat=5)):
        if "1" in needs:
            saved = None if recompute else results
            grads = backward(library, network, x, needs, grad, saved)
            assert len(grads) == needs.count("1")
            check_equal(grads, results, dtype)


@every_dtype
@pytest.mark.parametrize("phi", PHIS)
def test_rounding_stays_within_its_bound(library, phi, dtype):
    widths = [33, 64, 17, 5]
    weights, biases = support.make_network(widths, "some", dtype)
    network = SimpleNamespace(phi=phi, weights=weights, biases=biases)
    x = torch.randn(150, 33).to(dtype)
    options = {"device": (2, H200[1])}
    found = forward(library, network, x, **options)
    activation = None if phi == "none" else phi
    hidden = [found["hidden 0"], found["hidden 1"]]
    exact = support.Exact(x, weights, biases, activation, hidden, found["y"])
    for name, bounded in zip(["y", "hidden 0", "hidden 1"], [exact.y, *exact.a[1:]]):
        bounded.check(found[name], name)

    needs, grad = "1" * 7, torch.randn(150, 5).to(dtype)
    bounds = exact.backward(grad)
    for saved in (found, None):
        check_bounds(backward(library, network, x, needs, grad, saved, **options), bounds)

    # The gradient at y in float32, as the kernels have it before they round delta.
    error = found["y"].float() - 0.5
    bounds = exact.backward(error if phi in ("sigmoid", "tanh") else error.to(dtype))
    target = torch.full_like(found["y"], 0.5)
    grads = backward(library, network, x, needs, target=target, loss_scale=0.5, **options)
    squares = error.double().square().sum()
    torch.testing.assert_close(grads.pop("squares")[0], squares, rtol=1e-12, atol=0)
    check_bounds(grads, bounds)


@every_dtype
@pytest.mark.parametrize("phi", ["none", "relu"])
@pytest.mark.parametrize("where", ["x", "weight", "bias", "grad_output"])
def test_numbers_that_are_not_finite(library, where, phi, dtype):
    """They propagate as in the formulas, and padding creates no others."""
    widths = [5, 35, 9, 3]
    network = integer_network(widths, phi, dtype, seed=3, density=5.0)
    x, grad = network.integers(19, 5), network.integers(19, 3)
    into = {"x": x, "weight": network.weights[1], "bias": network.biases[0], "grad_output": grad}
    flat = into[where].view(-1)
    for n, value in enumerate([torch.inf, torch.nan, -torch.inf]):
        flat[3 + 7 * n] = value
    results = exact_results(network, x, grad, dtype)
    assert any(not r.isfinite().all() for r in results.values())
    assert any(r.isfinite().any() for r in results.values())
    check_equal(forward(library, network, x), results, dtype)
    for saved in (results, None):
        grads = backward(library, network, x, "1" * 7, grad, saved)
        check_equal(grads, results, dtype)


@every_dtype
@pytest.mark.parametrize("where", ["x", "weight", "grad_output"])
def test_infinity_does_not_meet_the_zeros_of_the_padding(library, where, dtype):
    """With no zero among the operands, an infinity yields infinities, and no NaN."""
    widths = [5, 6, 3]
    network = integer_network(widths, "none", dtype)
    for tensor in (*network.weights, *network.biases):
        tensor.fill_(1)
    x, grad = torch.ones(19, 5, dtype=dtype), torch.ones(19, 3, dtype=dtype)
    into = {"x": x, "weight": network.weights[0], "grad_output": grad}
    into[where][2, 1] = torch.inf
    results = exact_results(network, x, grad, dtype)
    assert not any(tensor.isnan().any() for tensor in results.values())
    check_equal(forward(library, network, x), results, dtype)
    for saved in (results, None):
        check_equal(backward(library, network, x, "11111", grad, saved), results, dtype)


def test_deep_network(library):
    for dtype in DTYPES:
        network = integer_network([9] * 17, "none", dtype, density=2.0)
        x, grad = network.integers(40, 9), network.integers(40, 9)
        results = exact_results(network, x, grad, dtype)
        check_equal(forward(library, network, x), results, dtype)
        check_equal(backward(library, network, x, "1" * 33, grad, results), results, dtype)
        check_equal(backward(library, network, x, "1" * 33, grad), results, dtype)


def test_rows_far_apart(library):
    """Offsets beyond 2^31 elements, in memory that is mostly never touched."""
    rows, stride = 20, 2**27
    network = integer_network([4, 3], "none", torch.bfloat16)
    x = network.integers(rows, 4)
    no_reserve = 0x4000  # MAP_NORESERVE, for which older Pythons have no name
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    with contextlib.closing(mmap.mmap(-1, 2 * rows * stride, flags=flags)) as memory:
        far = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((rows, 4), (stride, 1))
        far.copy_(x)
        call = new_call(network, rows)
        call.x, call.x_strides = far.data_ptr(), Call._strides(*far.stride())
        y = torch.empty(rows, 3, dtype=torch.bfloat16)
        call.y = y.data_ptr()
        run(library.run_forward, call)
        del far
        gc.collect()
    results = exact_results(network, x, network.integers(rows, 3), torch.bfloat16)
    check_equal({"y": y}, results, torch.bfloat16)


# -- The emulator ----------------------------------------------------------------------------


def test_the_emulator_sees_mistakes(library):
    said = {n: library.run_mistake(n) for n in range(5)}
    assert said[0] is None
    assert b"threads wait for others that have left" in said[1]
    assert b"a write outside the block's shared memory" in said[2]
    assert b"not aligned" in said[3]
    assert b"more shared memory than a block may have" in said[4]
    # A missing barrier shows in the result.
    assert library.mixed_up(True) == 0
    assert library.mixed_up(False) > 0


# -- Order of execution --------------------------------------------------------------------


@every_dtype
def test_same_bits_in_every_order_of_threads_and_blocks(library, dtype):
    weights, biases = support.make_network([20, 40, 33, 6], "all", dtype)
    network = SimpleNamespace(phi="tanh", weights=weights, biases=biases)
    x, target = torch.randn(400, 20).to(dtype), torch.randn(400, 6).to(dtype)

    def results(seed):
        options = {"seed": seed, "device": (3, H200[1])}
        found = forward(library, network, x, **options)
        return found | backward(
            library, network, x, "1" * 7, target=target, loss_scale=1.0, **options
        )

    first = results(0)
    for seed in (1, 2):
        for name, tensor in results(seed).items():
            assert torch.equal(tensor, first[name]), name


def test_number_of_launches(library):
    network = integer_network([8] * 6, "none", torch.bfloat16)
    x = network.integers(5, 8)
    before = library.launches()
    forward(library, network, x)
    assert library.launches() == before + 1
    backward(library, network, x, "1" * 11, grad_output=x)
    assert library.launches() == before + 3


# -- Plans -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "dtype", "device", "forward", "saved", "recomputed"),
    [
        ([64] * 4, torch.bfloat16, H200, 256, 128, 128),
        ([64] * 4, torch.bfloat16, A100, 256, 128, 64),
        ([64] * 4, torch.float32, H200, 64, 64, 64),
        ([64] * 4, torch.float32, A100, 64, 32, 32),
        ([128] * 4, torch.float16, H200, 256, 0, 0),
        ([128] * 2, torch.float16, H200, 256, 128, 64),
        ([128] * 2, torch.float32, H200, 64, 32, 32),
        ([32] * 17, torch.bfloat16, H200, 256, 64, 64),
        ([3, 2, 1], torch.float32, H200, 64, 64, 64),
        ([128, 129], torch.bfloat16, H200, 0, 0, 0),
    ],
    ids=str,
)
def test_tile_rows(library, widths, dtype, device, forward, saved, recomputed):
    """The chosen tile, or 0 where the fused kernels do not serve the call."""
    network = integer_network(widths, "none", dtype)
    for rows in (1, 1000, 2**20, 2**40):
        for expected, arguments in zip(
            (forward, saved, recomputed), ((False,), (True,), (True, True))
        ):
            p = plan(library, network, rows, *arguments, device=device)
            assert p.serves == (expected > 0)
            if p.serves:
                assert p.tile_rows == expected
                assert p.shared <= device[1]
                assert p.grid == min(-(-rows // p.tile_rows), p.grid)
                assert 0 < p.grid <= 2 * device[0]
                assert p.workspace == -(-4 * p.grid * p.sum_floats // 16) * 16 + 8 * p.grid


def test_not_a_byte_more_than_planned(library):
    """Backward passes on a device with exactly the shared memory that they need."""
    for dtype, widths in ((torch.bfloat16, [97, 64, 33]), (torch.float32, [65, 50, 3])):
        network = integer_network(widths, "relu", dtype)
        x, grad = network.integers(150, widths[0]), network.integers(150, widths[-1])
        results = exact_results(network, x, grad, dtype)
        for recompute in (False, True):
            needed = plan(library, network, 150, True, recompute).shared
            saved = None if recompute else results
            grads = backward(library, network, x, "1" * 5, grad, saved, device=(1, needed))
            check_equal(grads, results, dtype)
            smaller = plan(library, network, 150, True, recompute, device=(1, needed - 1))
            assert not smaller.serves or smaller.shared < needed


# -- Index arithmetic ------------------------------------------------------------------------


def test_columns_of_the_tiles(library):
    """Each column occurs once, and a lane has 8 neighbors in the 4 tiles of a group."""
    column = library.index_of_column
    assert sorted(column(tile, n) for tile in range(16) for n in range(8)) == list(range(128))
    for group, t in itertools.product(range(4), range(4)):
        held = [column(4 * group + i, 2 * t + e) for i in range(4) for e in range(2)]
        assert held == list(range(32 * group + 8 * t, 32 * group + 8 * t + 8))


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_vectors_in_shared_memory(library, groups):
    """Every vector has its own offset, and no two lanes of a phase share a bank."""
    place, vectors = library.offset_of_vector, 4 * groups
    places = {place(row, vector, groups) for row in range(128) for vector in range(vectors)}
    assert places == set(range(0, 16 * 128 * vectors, 16))

    def banks(rows_and_vectors):
        return {place(row, vector, groups) // 16 % 8 for row, vector in rows_and_vectors}

    for q in range(groups):
        for row in range(0, 128, 2):
            phase = [(row + lane // 4, 4 * q + lane % 4) for lane in range(8)]
            assert len(banks(phase)) == 8
    for row, vector in itertools.product(range(0, 128, 8), range(vectors)):
        assert len(banks((row + lane, vector) for lane in range(8))) == 8


def test_rows_of_floats_in_shared_memory(library):
    for width in range(1, 129):
        stride = library.stride_of_floats(width)
        assert stride >= width and stride % 4 == 0
        assert len({row * stride // 4 % 8 for row in range(8)}) == 8


@pytest.mark.parametrize("is_16_bit", [True, False], ids=["16 bits", "float32"])
@pytest.mark.parametrize("widths", [(1, 1), (3, 2), (32, 32), (33, 17), (100, 128)], ids=str)
def test_places_of_the_sums(library, widths, is_16_bit):
    """Every element of the gradients has one place among the sums."""
    n_in, n_out = widths
    dtype = torch.bfloat16 if is_16_bit else torch.float32
    count = plan(library, integer_network(widths, "none", dtype), 1, True).sum_floats
    found = []
    place = (ctypes.c_int64 * 2)()
    for index in range(count):
        library.place_of_sum(is_16_bit, index, n_out, n_in, place)
        if place[0] >= 0:
            found.append(tuple(place))
    assert sorted(found) == list(itertools.product(range(n_out), range(-1, n_in)))
