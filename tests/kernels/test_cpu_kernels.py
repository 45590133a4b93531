"""The kernels of every instruction set that this machine has: values, memory, accuracy, bits,
numbers that are not finite, and plans.
"""

import collections
import functools
import itertools
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import relu_mlp
import support
from relu_mlp import ops

R = torch.ops.relu_mlp
T = torch.ops.relu_mlp_testing
SETS = relu_mlp.build_info().supported_instruction_sets

# Without the library there is nothing to test here.
__test__ = bool(SETS)


def chosen():
    return relu_mlp.build_info().instruction_set


@pytest.fixture(params=SETS)
def instruction_set(request):
    """Every instruction set in turn. The test runs on it."""
    before = chosen()
    T.choose_instruction_set(request.param)
    yield request.param
    T.choose_instruction_set(before)


@pytest.fixture
def on_baseline():
    """Lets the library's products serve large networks, whoever made the processor."""
    before = chosen()
    T.choose_instruction_set("baseline")
    yield
    T.choose_instruction_set(before)


every_dtype = pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
DTYPES_16BIT = [torch.bfloat16, torch.float16]
BF16_SETS = ["avx512_bf16", "amx"]  # these sets multiply bfloat16, and treat subnormal numbers as 0
every_16bit_dtype = pytest.mark.parametrize("dtype", DTYPES_16BIT, ids=str)

COMPILED = relu_mlp.build_info().instruction_sets
CSRC = Path(__file__).resolve().parents[2] / "csrc"
FAMILIES = ["generic", "amd"]  # families of processors, which have rows in csrc/cpu/tuning.cpp
PROCESSORS = [  # everything that a plan depends on besides the shape: see plan()
    *itertools.product(support.DTYPES, COMPILED, FAMILIES, [False]),
    *itertools.product([torch.float16], COMPILED, FAMILIES, [True]),
]
PRODUCTS = ["forward", "grad_input", "grad_weight"]
needs_x86 = pytest.mark.skipif("amx" not in COMPILED, reason="needs kernels for x86-64")


def plan(
    rows, widths, dtype=torch.float32, isa="avx512", family="generic", has_half_arithmetic=False
):
    """The plan of a call for an instruction set and a processor family, which this machine may
    lack. Two empty strings mean the chosen set and this processor.
    """
    name = str(dtype).removeprefix("torch.")
    text = T.plan(rows, widths, name, isa, family, has_half_arithmetic)
    answer = dict(line.split(":") for line in text.splitlines())
    return {
        key: value.split()
        if key in PRODUCTS
        else int(value)
        if key in ("block", "chunk", "chunks")
        else value.strip()
        for key, value in answer.items()
    }


def plan_here(rows, widths, dtype):
    return plan(rows, widths, dtype, "", "")


def run_operators(x, weights, biases, grad_output, activation="none"):
    """All results of the operators for a network, by name. grad_output is the gradient at y.

    The target of the loss is y - grad_output, so the gradients are the same.
    """
    layers = len(weights)
    needs = "1" * (1 + layers) + ("1" if biases else "0") * layers
    y, hidden = R.forward(x, weights, biases, activation, True)
    saved = [x, *([y] if activation != "none" else []), *weights, *hidden]
    grads = R.backward(grad_output, saved, activation, needs)
    again = R.recompute_backward(grad_output, x, weights, biases, activation, needs)
    loss, by_loss = R.loss_and_grads(x, y - grad_output, weights, biases, "half_sse", activation)
    names = [*support.leaves(x, weights, biases)]
    found = {"y": y, "y of inference": R.relu_mlp(x, weights, biases, activation), "loss": loss}
    found |= {f"hidden[{layer}]": a for layer, a in enumerate(hidden)}
    for how, gradients in (("", grads), ("recomputed ", again)):
        found |= {f"{how}grad of {name}": g for name, g in zip(names, gradients, strict=True)}
    found |= {f"loss's grad of {name}": g for name, g in zip(names[1:], by_loss, strict=True)}
    return found


# -- Values ----------------------------------------------------------------------------

# On both sides of every edge of a vector, a tile, a panel, a block and a chunk.
WIDTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49]
WIDTHS += [63, 64, 65, 95, 96, 97, 127, 128, 129, 256]
ROWS = [0, 1, 2, 5, 6, 7, 11, 12, 13, 23, 24, 25, 47, 48, 49, 95, 96, 97]
ROWS += [239, 240, 241, 479, 480, 481, 500]
SHAPES = [  # cases that random sizes would seldom reach
    (5, [300, 129, 7]),  # a weight too large to be transposed as a whole
    (7, [300, 129, 7]),
    (96, [129, 300, 5]),
    (49, [256, 256, 256]),  # rows that map to the same cache sets
    (300, [64, 256, 9]),  # several blocks
    (300, [256, 200, 9]),
    (500, [130, 256, 5]),  # several blocks in each of several chunks
    (1100, [9, 17, 3]),
    (1, [300, 500, 3]),  # more weights than the package's own products serve
    (7, [300, 500, 3]),
    (50, [500, 300, 17]),  # rows that fill one panel with AVX-512, and are packed
    (70, [500, 300, 17]),
    (16, [300, 203, 9]),  # with AVX2 they fill several
    (64, [130, 259, 256]),
    (20, [515, 510, 7]),  # rows that hardly fill a panel, and a weight that is not packed
    (40, [203, 700, 130]),  # one block of bfloat16, with more weights than are packed once
    (2100, [260, 510, 3]),  # blocks whose products are shared among threads
]


def random_shape(seed):
    if seed < len(SHAPES):
        return SHAPES[seed]
    r = random.Random(seed)
    sizes = r.choices(WIDTHS, k=r.randint(2, 4))
    rows = r.choice([rows for rows in ROWS if rows * max(sizes) < 20_000])
    return rows, sizes


@functools.cache
def exact_case(seed, shape=None):
    """A network of small integers, with no rounding in any dtype, and its results in float64."""
    generator = torch.Generator().manual_seed(seed)
    rows, sizes = shape or random_shape(seed)

    def integers(*shape, density=1.0):
        signs = torch.randint(-1, 2, shape, generator=generator, dtype=torch.float64)
        return signs * (torch.rand(shape, generator=generator) < density)

    weights = [
        integers(n_out, n_in, density=6 / max(n_in, n_out)) for n_in, n_out in zip(sizes, sizes[1:])
    ]
    biases = [integers(n_out) for n_out in sizes[1:]] if seed % 3 else []
    x = integers(rows, sizes[0])
    grad_output = integers(rows, sizes[-1], density=min(1, 1000 / max(1, rows)))
    activation = ["none", "relu"][seed % 2]

    named = support.leaves(x, weights, biases)
    for leaf in named.values():
        leaf.requires_grad_()
    z, a = [], x
    for layer, weight in enumerate(weights):
        z.append(F.linear(a, weight, biases[layer] if biases else None))
        z[-1].retain_grad()
        a = z[-1].relu() if layer < len(weights) - 1 or activation == "relu" else z[-1]
    a.backward(grad_output)
    # bfloat16 holds the integers up to 256, including y - grad_output. The sums of all
    # gradients are rounded once.
    assert all(t.numel() == 0 or t.abs().max() < 255 for t in [*z, *[t.grad for t in z]])
    expected = {"y": a, "y of inference": a, "loss": 0.5 * grad_output.square().sum()}
    expected |= {f"hidden[{layer}]": t.relu() for layer, t in enumerate(z[:-1])}
    for how in ("", "recomputed ", "loss's "):
        expected |= {f"{how}grad of {name}": leaf.grad for name, leaf in named.items()}
    del expected["loss's grad of x"]
    detached = [[t.detach() for t in tensors] for tensors in ([x, grad_output], weights, biases)]
    return detached, activation, {name: t.detach() for name, t in expected.items()}


def check_exactly(seed, dtype, place=lambda t: t, shape=None):
    """Compares everything with float64. `place` moves an operand to its place in memory."""
    operands, activation, expected = exact_case(seed, shape)
    (x, grad_output), weights, biases = [
        [place(t.to(dtype)) for t in tensors] for tensors in operands
    ]
    found = run_operators(x, weights, biases, grad_output, activation)
    support.assert_same(
        found, {name: t.to(dtype) for name, t in expected.items()}, f"{shape or random_shape(seed)}"
    )


@every_dtype
def test_exact_on_small_integers(instruction_set, dtype):
    """Sums of small integers are exact in every order: nothing is left out or counted twice."""
    for seed in range(120):
        check_exactly(seed, dtype)


@every_dtype
def test_exact_where_the_library_multiplies(on_baseline, dtype):
    """In several blocks of rows, whose sums the library computes as precisely as one."""
    rows, sizes = 2500, (365, 362, 2)
    served = plan_here(rows, sizes, dtype)
    assert served["layers"] == "library" and (served["block"] < rows) == (dtype not in DTYPES_16BIT)
    check_exactly(0, dtype, shape=(rows, sizes))


@every_dtype
def test_within_the_bounds_of_rounding(instruction_set, dtype):
    for seed in range(40):
        rows, sizes = random_shape(seed)
        if rows * max(sizes) > 10_000:
            continue
        torch.manual_seed(seed)
        activation = support.ACTIVATIONS[seed % len(support.ACTIVATIONS)]
        weights, biases = support.make_network(sizes, ["all", "none"][seed % 2], dtype)
        x = torch.randn(rows, sizes[0]).to(dtype)
        grad_output = torch.randn(rows, sizes[-1]).to(dtype)
        found = run_operators(x, weights, biases or [], grad_output, activation or "none")
        hidden = [found[f"hidden[{layer}]"] for layer in range(len(weights) - 1)]
        exact = support.Exact(x, weights, biases, activation, hidden, found["y"])
        exact.y.check(found["y"], "y")
        grads = exact.backward(grad_output)
        for name in support.leaves(x, weights, biases):
            grads[name].check(found[f"grad of {name}"], f"{rows, sizes} grad of {name}")
            grads[name].check(
                found[f"recomputed grad of {name}"], f"{rows, sizes} recomputed grad of {name}"
            )


# -- Memory ----------------------------------------------------------------------------


def amid_nan(t):
    """A copy inside a larger matrix of NaN."""
    larger = t.new_full([size + 8 for size in t.shape], math.nan)
    inner = larger[(slice(3, -5),) * t.dim()]
    return inner.copy_(t)


def between_nan(t):
    """A contiguous copy with NaN before and after it."""
    larger = t.new_full((t.numel() + 256,), math.nan)
    return larger[128:-128].view(t.shape).copy_(t)


def transposed(place):
    return lambda t: place(t.mT).mT if t.dim() == 2 else place(t)


PLACES = {
    "contiguous between NaN": between_nan,
    "within a matrix of NaN": amid_nan,
    "transposed between NaN": transposed(between_nan),
    "transposed within a matrix of NaN": transposed(amid_nan),
}


@every_dtype
@pytest.mark.parametrize("where", PLACES)
def test_reads_nothing_but_the_operands(instruction_set, dtype, where):
    """For all strides. The memory around the operands does not change."""
    around = []

    def placed(t):
        result = PLACES[where](t)
        around.append((result._base, result._base.clone()))
        return result

    for seed in range(25):
        rows, sizes = random_shape(seed)
        is_own = plan_here(rows, sizes, dtype)["layers"] != "library"
        # PyTorch's own product of bfloat16 slices multiplies the numbers beside them by 0.
        if is_own or dtype != torch.bfloat16 or "matrix" not in where:
            check_exactly(seed, dtype, placed)
    for now, before in around:
        support.assert_same(now, before)


@every_dtype
def test_expanded_operands(instruction_set, dtype):
    """Strides of 0, as in the gradient that y.sum() sends back."""
    for rows, sizes in [(7, [5, 33, 17]), (500, [33, 17, 65]), (50, [500, 300, 17])]:
        weights, biases = support.integer_network(
            sizes, dtype=dtype, requires_grad=False, largest=1
        )
        x, one = support.integers(1, sizes[0], dtype=dtype), torch.ones(1, 1, dtype=dtype)
        operands = (x.expand(rows, sizes[0]), one.expand(rows, sizes[-1]))
        found = run_operators(operands[0], weights, biases, operands[1])
        x, grad_output = [t.contiguous() for t in operands]
        support.assert_same(found, run_operators(x, weights, biases, grad_output))


GUARDED = """
import torch
from kernels import test_cpu_kernels as t
torch.set_num_threads(1)
for name in t.SETS:
    t.T.choose_instruction_set(name)
    for dtype in t.support.DTYPES:
        for seed in range(25):
            t.check_exactly(seed, dtype)
"""


def run(code, **variables):
    """Runs Python code in a process of its own, with additional environment variables."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment | variables,
        capture_output=True,
        text=True,
    )


MALLOC_DEBUG = next(Path("/").glob("lib*/*/libc_malloc_debug.so.0"), None) or next(
    Path("/").glob("lib*/libc_malloc_debug.so.0"), None
)


@pytest.mark.slow
@pytest.mark.skipif(not MALLOC_DEBUG, reason="needs glibc's libc_malloc_debug.so.0")
def test_writes_nothing_beyond_its_memory():
    """glibc marks the byte after every block, and new memory is filled with a pattern."""
    result = run(GUARDED, LD_PRELOAD=str(MALLOC_DEBUG), MALLOC_CHECK_="3", MALLOC_PERTURB_="128")
    assert result.returncode == 0, f"{result.returncode} {result.stderr[-2000:]}"


# -- Accuracy --------------------------------------------------------------------------

# The suite of the benchmarks, with fewer rows where rows are many or layers wide.
SUITE = [
    (64, [3, 2, 1]),
    (64, [1000, 100, 10]),
    (1, [8, 64, 64, 4]),
    (256, [64, 64, 8]),
    (512, [64, 64, 64]),
    (20_000, [32, 64, 16]),
    (1000, [64, 64, 64, 64, 16]),
    (128, [784, 512, 10]),
    (256, [784, 1024, 10]),
    (64, [479, 1024, 1024, 512, 256, 1]),
    (256, [512, 512, 512]),
    (64, [768, 3072, 768]),
]


def errors(found, x, weights, biases, grad_output):
    """The largest error of y and of every gradient, by name, against float64.

    The units that are on are taken from the hidden activations that were found. Where a
    pre-activation is nearly 0, either answer is right.
    """
    largest = {}

    def enter(name, exact):
        # No result can be more accurate than the rounding of its largest element.
        rounding = torch.finfo(x.dtype).eps / 2 * exact.abs().max()
        error = (found[name].double() - exact).abs().max()
        largest[name] = max(rounding.item(), error.item())

    inputs = [x.double()]
    for weight, bias in zip(weights, biases):
        z = F.linear(inputs[-1], weight.double(), bias.double())
        inputs.append(z.relu())
    enter("y", z)
    delta = grad_output.double()
    for layer in reversed(range(len(weights))):
        enter(f"grad of weights[{layer}]", delta.T @ inputs[layer])
        enter(f"grad of biases[{layer}]", delta.sum(0))
        delta = delta @ weights[layer].double()
        if layer:
            delta = delta * (found[f"hidden[{layer - 1}]"] > 0)
    enter("grad of x", delta)
    return largest


def run_natively(x, weights, biases, grad_output):
    named = support.leaves(x, weights, biases)
    for leaf in named.values():
        leaf.requires_grad_()
    found, a = {}, x
    for layer, (weight, bias) in enumerate(zip(weights, biases)):
        a = F.linear(a, weight, bias)
        if layer < len(weights) - 1:
            a = found[f"hidden[{layer}]"] = a.relu()
    grads = support.gradients(a, named, grad_output)
    for leaf in named.values():
        leaf.requires_grad_(False)
    found |= {"y": a} | {f"grad of {name}": g for name, g in grads.items()}
    return {name: t.detach() for name, t in found.items()}


def check_accuracy(rows, sizes, dtype):
    """The largest error of a network, as the root mean square over several networks."""
    ours, natives = collections.Counter(), collections.Counter()
    # The largest of few errors varies by chance, so small networks are repeated often.
    work = rows * sum(sizes) + sum(map(math.prod, zip(sizes, sizes[1:])))
    for _ in range(min(50, max(2, 300_000 // work))):
        weights, biases = support.make_network(sizes, dtype=dtype)
        x = torch.randn(rows, sizes[0]).to(dtype)
        grad_output = torch.randn(rows, sizes[-1]).to(dtype)
        network = x, weights, biases, grad_output
        for squares, found in (ours, run_operators(*network)), (natives, run_natively(*network)):
            for name, error in errors(found, *network).items():
                squares[name] += error**2
    ratios = {name: round(math.sqrt(ours[name] / natives[name]), 2) for name in ours}
    assert max(ratios.values()) <= 1.5, ratios


@pytest.mark.slow
@pytest.mark.parametrize("dtype", support.DTYPES[1:], ids=str)
@pytest.mark.parametrize(("rows", "sizes"), SUITE, ids=str)
def test_as_accurate_as_the_native_path(rows, sizes, dtype):
    """The largest error is at most 1.5 times as large."""
    check_accuracy(rows, sizes, dtype)


@pytest.mark.parametrize(("rows", "sizes"), [SUITE[n] for n in (1, 3, 5, 7)], ids=str)
def test_every_instruction_set_is_as_accurate(instruction_set, rows, sizes):
    check_accuracy(rows, sizes, torch.float32)


@every_16bit_dtype
@pytest.mark.parametrize("sizes", [[2, 3], [365, 362]], ids=str)
def test_sums_over_many_rows_are_not_kept_in_16_bits(sizes, dtype):
    """10000 - 9999 is 1, whatever is summed in between."""
    x = torch.ones(1, 1, dtype=dtype).expand(20_000, sizes[0])
    grad_output = torch.ones(20_000, 1, dtype=dtype)
    grad_output[0], grad_output[10_001:] = 0, -1
    grad_output = grad_output.expand(-1, sizes[1])
    for grad in R.backward(grad_output, [x], "none", "011"):
        assert (grad == 1).all()


# -- Bits ------------------------------------------------------------------------------


def bits(found):
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return {name: t.contiguous().view(kinds[t.element_size()]) for name, t in found.items()}


@pytest.fixture
def threads():
    """Sets the number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_dtype
@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (4, [300, 400]),  # dot products without packing
        (200, [129, 300, 65]),  # one chunk, whose products are shared among threads
        (20, [150, 300, 203]),
        (300, [64, 256, 9]),
        (450, [100, 300, 100]),  # column sums too
        (1000, [64, 64, 64]),  # several chunks
        (4000, [32, 64, 16]),
    ],
    ids=str,
)
def test_the_same_bits_for_any_number_of_threads(instruction_set, threads, rows, sizes, dtype):
    """The same bits from run to run, too."""
    assert plan_here(rows, sizes, dtype)["layers"] != "library"
    weights, biases = support.make_network(sizes, dtype=dtype)
    x, grad_output = torch.randn(rows, sizes[0]).to(dtype), torch.randn(rows, sizes[-1]).to(dtype)
    network = x, weights, biases, grad_output, "tanh"
    threads(1)
    first = bits(run_operators(*network))
    for count in (1, 2, 3):
        threads(count)
        support.assert_same(bits(run_operators(*network)), first, f"{count} threads")


@every_dtype
def test_the_same_bits_whether_hidden_activations_are_kept(instruction_set, dtype):
    for seed in range(60):
        rows, sizes = random_shape(seed)
        weights, biases = support.make_network(sizes, dtype=dtype)
        x = torch.randn(rows, sizes[0]).to(dtype)
        kept, hidden = R.forward(x, weights, biases, "sigmoid", True)
        not_kept, nothing = R.forward(x, weights, biases, "sigmoid", False)
        assert len(hidden) == len(weights) - 1 and nothing == []
        support.assert_same(bits({"y": not_kept}), bits({"y": kept}), f"{rows, sizes}")


# -- Numbers that are not finite ---------------------------------------------------------


def kinds(found):
    """0 for a finite number, 1 or -1 for an infinite one, 2 for NaN."""
    return {
        name: torch.where(t.isnan(), 2, t.isinf() * t.sign().nan_to_num()).to(torch.int8)
        for name, t in found.items()
    }


@every_dtype
@pytest.mark.parametrize("where", ["x", "weights[0]", "weights[1]", "biases[0]", "grad_output"])
def test_nan_and_infinity_go_where_they_go_natively(instruction_set, where, dtype):
    check_where_nan_goes(50, [66, 35, 18], where, dtype)
    if dtype not in DTYPES_16BIT:  # PyTorch's bfloat16 product of an odd number of rows spreads NaN
        check_where_nan_goes(20, [300, 500, 3], where, dtype)


def check_where_nan_goes(rows, sizes, where, dtype):
    r = random.Random(0)
    weights, biases = support.make_network(sizes, dtype=dtype)
    x, grad_output = torch.randn(rows, sizes[0]).to(dtype), torch.randn(rows, sizes[-1]).to(dtype)
    operand = {**support.leaves(x, weights, biases), "grad_output": grad_output}[where]
    edges = [0, 3, 4, 5, 6, 7, 8, 15, 16, 17, 31, 32, 47, 48, 63, 64]
    for _ in range(4):
        index = tuple(r.choice([e for e in [*edges, n - 1] if e < n]) for n in operand.shape)
        before = operand[index].item()
        for value in (math.nan, math.inf, -math.inf):
            operand[index] = value
            found = kinds(run_operators(x, weights, biases, grad_output))
            tensors = [x], weights, biases, [grad_output]
            if dtype in DTYPES_16BIT:
                tensors = [[t.float() for t in group] for group in tensors]
            (x_,), weights_, biases_, (grad_,) = tensors
            expected = kinds(run_natively(x_, weights_, biases_, grad_))
            for name, kind in expected.items():
                support.assert_same(found[name], kind, f"{value} at {index}: {name}")
        operand[index] = before


@every_dtype
@pytest.mark.parametrize("width", [1, 3, 8, 17, 33, 65, 400])
def test_an_infinite_gradient_at_a_masked_unit_gives_0(instruction_set, width, dtype):
    """Every other hidden unit is off. The width 400 makes the library compute the products."""
    rows = 9
    weights, biases = support.make_network([400, width, 3], dtype=dtype)
    is_off = torch.arange(width) % 2 == 0
    with torch.no_grad():
        weights[0][is_off] = 0
        biases[0][is_off] = -0.0
    x = torch.ones(rows, 400, dtype=dtype)
    grad_output = torch.full((rows, 3), math.inf, dtype=dtype)
    found = run_operators(x, weights, biases, grad_output)
    for how in ("", "recomputed "):
        assert (found[f"{how}grad of weights[0]"][is_off] == 0).all()
        assert (found[f"{how}grad of biases[0]"][is_off] == 0).all()


def all_numbers(dtype):
    """All 65536 patterns of 16 bits, without the subnormal ones where those count as 0."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    if chosen() in BF16_SETS and dtype == torch.bfloat16:
        is_subnormal = (numbers != 0) & (numbers.float().abs() < torch.finfo(dtype).tiny)
        numbers = torch.where(is_subnormal, 0, numbers)
    return numbers


@every_16bit_dtype
def test_every_number_of_16_bits(instruction_set, dtype):
    """Through a layer with the weight 1, forward, backward and through ReLU and its mask."""
    numbers = all_numbers(dtype)[:, None]
    one = torch.ones(1, 1, dtype=dtype)
    is_on = ~(numbers <= 0)
    same, relu = support.assert_same, torch.where(is_on, numbers, 0)
    for x in (numbers, numbers.flip(0)[:5], numbers[-13:-1]):  # for every way of multiplying
        same(R.relu_mlp(x, [one], [], "none"), x)
    y, (hidden,) = R.forward(numbers, [one, one], [], "none", True)
    same(hidden, relu)
    same(y, relu)
    same(R.relu_mlp(numbers, [one], [], "relu"), relu)
    ones = torch.ones_like(numbers)
    same(R.backward(numbers, [one], "none", "100")[0], numbers)
    same(R.backward(numbers, [numbers, one], "relu", "100")[0], torch.where(is_on, numbers, 0))
    same(R.backward(ones, [one, one, numbers], "none", "10000")[0], is_on.to(dtype))
    for operands in ([numbers, ones], [ones, numbers]):
        (grad,) = R.recompute_backward(*operands, [one, one], [], "none", "10000")
        same(grad, torch.where(~(operands[1] <= 0), operands[0], 0))


@every_16bit_dtype
def test_every_number_of_16_bits_between_the_library_s_products(instruction_set, dtype):
    numbers = torch.cat([all_numbers(dtype), all_numbers(dtype)[:13]])
    width = numbers.numel()
    zeros, ones = torch.zeros(2, 1, dtype=dtype), torch.ones(2, 1, dtype=dtype)
    weights = [torch.zeros(width, 1, dtype=dtype), torch.ones(1, width, dtype=dtype)]
    if plan_here(2, [1, width, 1], dtype)["layers"] != "library":
        pytest.skip("this package's products serve float16 of any size here")
    _, (hidden,) = R.forward(zeros, weights, [numbers, zeros[0]], "none", True)
    # not the numbers themselves: the library treats subnormal bfloat16 as 0
    support.assert_same(hidden, F.linear(zeros, weights[0], numbers).relu())
    saved = [weights[1], numbers.expand(2, width)]
    (grad,) = R.backward(ones, saved, "none", "00010")
    support.assert_same(grad, 2 * (~(numbers <= 0)).to(dtype))


@every_16bit_dtype
@pytest.mark.parametrize("rows", [1, 40])
def test_the_next_layer_gets_what_is_rounded(instruction_set, dtype, rows):
    """The hidden activation 2**k + 1 rounds to 2**k. Three of them make the sum another number."""
    power = 256.0 if dtype == torch.bfloat16 else 2048.0
    x = torch.tensor([[power, 1.0]], dtype=dtype).repeat(rows, 1)
    weights = [torch.ones(3, 2, dtype=dtype), torch.ones(1, 3, dtype=dtype)]
    for saves_hidden in (False, True):
        y, _ = R.forward(x, weights, [], "none", saves_hidden)
        support.assert_same(y, torch.full((rows, 1), 3 * power, dtype=dtype))


@every_16bit_dtype
def test_rounds_to_the_nearest_number_of_16_bits(instruction_set, dtype):
    """Ties go to even: every number plus a part of its distance to the next."""
    numbers = all_numbers(dtype)
    numbers = numbers[numbers.isfinite()].float()
    up = numbers.to(dtype).view(torch.int16).add(1).view(dtype).float()
    for part in (0.25, 0.5, 0.75):
        x = torch.stack([numbers, (part * (up - numbers)).nan_to_num()], dim=1).to(dtype)
        if chosen() in BF16_SETS and dtype == torch.bfloat16:
            x = torch.where(x.float().abs() < torch.finfo(dtype).tiny, 0, x)
        expected = x.double().sum(1, keepdim=True).float().to(dtype)
        found = R.relu_mlp(x, [torch.ones(1, 2, dtype=dtype)], [], "none")
        support.assert_same(found, expected, f"{part}")
        # The same sums as the gradient of a weight, in one block of rows and in several.
        for rows in (6, 500):
            column = torch.zeros(rows, x.shape[0], dtype=dtype)
            column[:2] = x.T
            (grad,) = R.backward(torch.ones(rows, 1, dtype=dtype), [column], "none", "010")
            support.assert_same(grad, expected.T, f"{part}, {rows} rows")


# -- How a call is served ----------------------------------------------------------------
# These tests ask for plans and compare them with each other. They know no tuned number.


def random_calls(count):
    r = random.Random(0)
    for _ in range(count):
        rows = r.choice([r.choice(ROWS), r.randrange(300), r.randrange(100_000)])
        yield rows, [r.choice([0, 1, 3, 17, 64, 300, 1000, 5000]) for _ in range(r.randint(2, 5))]


def test_plan_covers_the_rows():
    for rows, widths in random_calls(500):
        for processor in PROCESSORS:
            p = plan(rows, widths, *processor)
            assert 1 <= p["block"] <= p["chunk"], (rows, widths, p)
            assert (p["chunks"] - 1) * p["chunk"] < max(1, rows) <= p["chunks"] * p["chunk"]
            for product in ("forward", "grad_input", "grad_weight"):
                assert len(p[product]) == len(widths) - 1
            assert p == plan(rows, widths, *processor)


def test_every_candidate_serves_some_call():
    found = {
        plan(rows, widths, *processor)["candidate"]
        for rows, widths in random_calls(300)
        for processor in PROCESSORS
    }
    expected = {"gemm_chunks", "gemm_shared", "library"}
    if any(name in COMPILED for name in BF16_SETS):
        expected |= {"bf16_one_block", "bf16_shared", "bf16_chunks"}
    assert found == (expected if "avx512" in COMPILED else expected - {"gemm_shared"})


@pytest.mark.parametrize("processor", PROCESSORS, ids=str)
def test_plan_of_small_and_of_large_networks(processor):
    for rows in (1, 64, 65536):
        assert plan(rows, [64, 64, 64], *processor)["layers"] != "library"
    # No family serves such weights with its own products, unless they are faster at any size.
    assert plan(2048, [3072, 3072, 3072], *processor)["candidate"] in ("library", "gemm_shared")


def test_the_library_s_products_in_16_bits_make_one_block():
    """The library rounds each sum, so several blocks would round a gradient several times."""
    for rows, widths in random_calls(500):
        for processor in PROCESSORS:
            p = plan(rows, widths, *processor)
            if p["layers"] == "library" and processor[0] in DTYPES_16BIT:
                assert p["block"] == max(1, rows)


@needs_x86
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_plan_where_the_library_is_slower(dtype):
    """Threads share this package's products instead. Everything else is as elsewhere.

    The library is slower in float32 on AMD processors, and in float16 on processors that only
    convert it.
    """
    faster = {"family": "generic", "has_half_arithmetic": True}
    slower = {"family": "amd", "has_half_arithmetic": False}
    for rows, widths in random_calls(500):
        elsewhere = plan(rows, widths, dtype, "avx512", **faster)
        p = plan(rows, widths, dtype, "avx512", **slower)
        if elsewhere["layers"] == "library":
            assert p["candidate"] == "gemm_shared"
            assert p["chunks"] == 1 and p["block"] <= elsewhere["block"]
        else:
            assert p == elsewhere


@needs_x86
def test_rows_that_make_one_panel_are_packed_instead_of_large_weights():
    """This pays off for weights whose products the library computes with more rows or fewer."""
    widths = [512, 512, 10]
    rows = range(2, 200)
    served = [r for r in rows if plan(r, widths, isa="avx512")["layers"] == "packed"]
    assert served == list(range(served[0], served[-1] + 1))
    assert all(plan(r, widths, isa="avx512")["forward"][:1] == ["left"] for r in served)
    for r in rows:
        assert plan(r, widths, isa="avx2")["layers"] == "library"  # its panel is narrower
        assert plan(r, widths, torch.bfloat16, "avx512")["layers"] == "library"
    assert plan(1, widths, isa="avx2")["layers"] == "packed"


@needs_x86
@pytest.mark.parametrize("isa", ["avx512_bf16", "amx"])
def test_plan_where_bfloat16_is_multiplied(isa):
    def candidates(widths, rows):
        return [plan(r, widths, torch.bfloat16, isa)["candidate"] for r in rows]

    # From some number of rows on: first in one block, then in chunks.
    found = [name for name, _ in itertools.groupby(candidates([64] * 3, range(1, 2000)))]
    assert found == ["gemm_chunks", "bf16_one_block", "bf16_chunks"]
    # With large weights: the library first, then one block, then dot products in several.
    found = [name for name, _ in itertools.groupby(candidates([784, 1024, 10], range(2, 5000)))]
    others = ["bf16_shared"] if isa == "avx512_bf16" else ["library"]
    assert found == ["library", "bf16_one_block", *others]
    # The library serves larger networks.
    found = [
        name for name, _ in itertools.groupby(candidates([w, 1024], [64])[0] for w in range(9000))
    ]
    assert found == ["bf16_one_block", "library"]
    # Without such products, and in other formats, the plan is that of avx512.
    for rows, widths in random_calls(200):
        for dtype in (torch.float32, torch.float64, torch.float16):
            assert plan(rows, widths, dtype, isa) == plan(rows, widths, dtype, "avx512")


def test_what_is_packed_when():
    for rows, widths in random_calls(500):
        for processor in PROCESSORS:
            p = plan(rows, widths, *processor)
            is_one_block = rows <= p["block"]
            packs = {product: set(p[product]) for product in PRODUCTS}
            if p["layers"] == "library":  # the library packs by itself
                assert packs == {product: {"none"} for product in PRODUCTS}
            elif p["layers"] == "packed":
                for product in ("grad_input", "grad_weight"):
                    assert packs[product] <= {"view", "once", "per_use"}
                if not is_one_block and 0 not in widths:  # every block uses the copy
                    assert packs["forward"] == {"once"}
                    assert packs["grad_input"] <= {"view", "once"}
                if is_one_block:
                    assert "once" not in packs["grad_input"]
            else:  # threads that share a product pack for themselves
                weight = {"per_use"} if p["chunks"] == 1 else {"once"}
                assert packs == {
                    "forward": weight, "grad_input": weight, "grad_weight": {"per_use"}
                }  # fmt: skip
    # Rows that map to the same cache sets are not read in place.
    views = {width: plan(64, [width, 64], isa=COMPILED[-1])["grad_input"] for width in (500, 512)}
    assert views == {500: ["view"], 512: ["per_use"]}


@pytest.mark.parametrize(
    ("widths", "dtype"),
    [
        *itertools.product(
            [[1, 1], [32, 64, 16], [256, 256, 256]], [torch.float32, torch.bfloat16]
        ),
        ([768, 3072, 768], torch.float32),  # in 16 bits the library gets all rows at once
    ],
    ids=str,
)
def test_memory_does_not_grow_with_the_rows(widths, dtype):
    """Besides its results, a call needs the activations of a block and the sums of the chunks."""
    for _, isa, family, _ in PROCESSORS:
        few, *many = [plan(10**n, widths, dtype, isa, family) for n in (4, 5, 6, 7, 8)]
        assert max(p["block"] for p in many) <= 2 * few["block"]
        assert len({p["chunks"] for p in many}) == 1  # the largest number of chunks


@pytest.mark.skipif(not CSRC.exists(), reason="needs the sources")
def test_kernels_know_nothing_of_pytorch():
    """Files compiled for one instruction set include no PyTorch header, directly or indirectly."""
    seen, todo = set(), [*CSRC.glob("cpu/kernels/*"), *CSRC.glob("cpu/isa/*")]
    assert len(todo) > 15
    while todo:
        path = todo.pop().resolve()
        if path in seen:
            continue
        seen.add(path)
        text = path.read_text()
        assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10|aoti)", text), path
        todo += [path.parent / name for name in re.findall(r'#\s*include "(.+)"', text)]


def asks_for_huge_pages(tensor):
    """Whether madvise(MADV_HUGEPAGE) was called for the middle of the tensor's memory."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if re.fullmatch("[0-9a-f]+-[0-9a-f]+", name):
            begin, end = (int(part, 16) for part in name.split("-"))
            within = begin <= middle < end
        elif within and name == "VmFlags:":
            return "hg" in rest.split()
    raise AssertionError("the memory is not in the list")


HUGE_PAGES = """
import torch
from kernels import test_cpu_kernels as t
dtype = {dtype}
width = 2**8 // dtype.itemsize
x = torch.zeros(2**18, width, dtype=dtype)
weights = [torch.zeros(width, width, dtype=dtype)] * 2
assert not t.asks_for_huge_pages(x)
y, [hidden] = t.R.forward(x, weights, [], "none", True)
[grad] = t.R.backward(y, [*weights, hidden], "none", "10000")
assert all(t.asks_for_huge_pages(result) for result in [y, hidden, grad])
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="the system has no huge pages to ask for",
)
@every_dtype
def test_large_results_get_huge_pages(dtype):
    """In a process of its own, because memory that an earlier test requested may be reused."""
    result = run(HUGE_PAGES.format(dtype=dtype))
    assert result.returncode == 0, result.stderr[-2000:]


# -- Which instruction set ---------------------------------------------------------------

GRADCHECK = """
import torch, relu_mlp
torch.manual_seed(0)
print(relu_mlp.build_info().instruction_set)
x, w, v = (torch.randn(*s).double().requires_grad_() for s in [(7, 3), (5, 3), (2, 5)])
assert torch.autograd.gradcheck(lambda x, w, v: relu_mlp.relu_mlp(x, [w, v]), (x, w, v))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_the_environment_chooses_the_instruction_set(name):
    result = run(GRADCHECK, RELU_MLP_ISA=name)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == name


UNKNOWN = """
import os, relu_mlp
try:
    relu_mlp.build_info()
except RuntimeError as error:
    print(error)
del os.environ["RELU_MLP_ISA"]
print(relu_mlp.build_info().instruction_set)
"""


@pytest.mark.slow
def test_an_unknown_instruction_set_is_refused_and_the_best_is_the_default():
    result = run(UNKNOWN, RELU_MLP_ISA="avx3")
    names = " ".join(f"'{name}'" for name in SETS)
    assert result.stdout.splitlines() == [
        f"RELU_MLP_ISA must be one of {names} on this machine, got 'avx3'",
        SETS[-1],
    ]


@pytest.mark.skipif(not CSRC.exists(), reason="needs the sources")
@needs_x86
def test_every_instruction_set_is_listed():
    """A file that csrc/cpu/isa/isa.cpp does not list would compile, and never run."""
    texts = [path.read_text() for path in CSRC.glob("cpu/isa/*.cpp")]
    assert set(COMPILED) == set(re.findall(r"^#define RELU_MLP_ISA (\w+)", "".join(texts), re.M))
    options = (CSRC.parent / "docs" / "troubleshooting.md").read_text()
    (row,) = re.findall(r"^\| `RELU_MLP_ISA` \|.*", options, re.M)
    assert set(COMPILED) <= set(re.findall(r"`(\w+)`", row))


@pytest.mark.skipif(not CSRC.exists(), reason="needs the sources")
def test_every_family_is_tested():
    rows = re.findall(r'family = "(\w+)"', (CSRC / "cpu/tuning.cpp").read_text())
    assert {"generic", *rows} == set(FAMILIES)


def test_an_unknown_choice_changes_nothing():
    before = chosen()
    with pytest.raises(RuntimeError, match=r"name must be one of .*, got 'avx3'"):
        T.choose_instruction_set("avx3")
    assert chosen() == before
    assert set(SETS) <= set(relu_mlp.build_info().instruction_sets)


def functions(path):
    """The name and the instructions of every function in a library."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True
    ).stdout
    for part in listing.split("\n\n"):
        if match := re.match(r"\n*[0-9a-f]+ <(.+)>:\n", part):
            yield match[1], part[match.end() :]


# Registers and instructions that came with AVX-512, and all that came with AVX.
AVX512 = re.compile(r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b")
AVX = re.compile(rf"{AVX512.pattern}|%ymm|:\tv(?!err|erw)")


@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
@pytest.mark.skipif("avx512" not in SETS and "avx2" not in SETS, reason="needs x86-64")
def test_no_shared_function_is_compiled_for_more_than_the_baseline():
    """The linker keeps one copy of an inline function, and it has to run everywhere."""
    found, leaks = set(), []
    for name, code in functions(ops.LIBRARY_PATH):
        # a mangled name begins with its length
        sets = {isa for isa in COMPILED if isa != "baseline" and f"{len(isa)}{isa}" in name}
        found |= sets
        if sets == {"avx2"}:
            leaks += [name] * bool(AVX512.search(code))
        elif not sets:
            leaks += [name] * bool(AVX.search(code))
    if not found:
        pytest.skip("the library is stripped")
    assert leaks == []
