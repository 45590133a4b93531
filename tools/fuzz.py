"""Random calls of the operators and public functions: `make fuzz`.

A case is a call with random sizes, layouts, dtypes, values, modes and settings, as a rule a
valid one, often one that something was done to: a tensor of another dtype, shape, device or
layout, without its memory, a list too short, a name that is none. Of every case is asked:

- The answer is right. Most numbers are small integers, times a power of two: their sums have no
  rounding, so answers must have the bits of the network in float64 (or of the native layers),
  NaN and infinities included. Real numbers are held to the bounds of tests/support.py.
- Or an exception of PyTorch's kinds comes, without the name of a C++ file. A valid call must not
  raise; where the native layers raise, so must the call.
- The arguments, and all memory that they are part of, are as they were.

All of a case follows from the seed and its number:

    make fuzz ARGS="--seed 5 --seconds 60"      another seed, another time
    make fuzz ARGS="--seed 5 --case 1234"       one case, with what it is made of

Cases run in a child process, so that one which crashes or hangs is reported like any other.
"""

from __future__ import annotations

import argparse
import collections
import copy
import faulthandler
import functools
import itertools
import math
import mmap
import os
import pickle
import random
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import relu_mlp
import support
from relu_mlp import checks, functional, ops, reference

R = torch.ops.relu_mlp
DTYPES = support.DTYPES
OTHER_DTYPES = [
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.uint16, torch.bool),
    *(torch.complex64, torch.complex128, torch.complex32),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]
#: Bits of a significand: integers up to 2 to the power of that have no rounding.
PRECISION = {torch.float64: 53, torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}
PYTORCHS = (RuntimeError, TypeError, ValueError, IndexError)
SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")


class Wrong(Exception):
    """A case found something."""


class Refused:
    """The exception of one of PyTorch's kinds that a call ended with."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __repr__(self) -> str:
        return f"{type(self.error).__name__}: {str(self.error)[:300]}"


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except PYTORCHS as error:
        return Refused(error)
    except AssertionError as error:
        if "FakeTensor" in str(error):  # what PyTorch says where fake and real ones meet
            return Refused(error)
        raise


def check_words(refused: Refused) -> None:
    text = str(refused.error).split("Could not run")[0]  # PyTorch lists its own files
    if not str(refused.error) or "csrc/" in text:
        raise Wrong(f"an exception that explains nothing, or names a C++ file: {refused!r}")


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.is_nested:
            return f"a nested {checks.name_of(value.dtype)}"
        try:
            layout = f"strides {value.stride()} offset {value.storage_offset()}"
            held = value.untyped_storage().nbytes() // max(1, value.element_size())
        except (NotImplementedError, RuntimeError):
            layout, held = str(value.layout), 0
        kind = "" if type(value) is Tensor else f" {type(value).__name__}"
        needs = " requires_grad" if value.requires_grad else ""
        return (
            f"{checks.name_of(value.dtype)}{tuple(value.shape)} {layout} of {held} on "
            f"{value.device}{kind}{needs}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(describe, value)) + "]"
    text = repr(value)
    return text if len(text) < 100 else f"{text[:100]}... ({len(text)} characters)"


# -- What a case is made of -------------------------------------------------------------


#: Where a child leaves its notes for the process that outlives it.
LIVE: mmap.mmap | None = None


class Case:
    """Random choices, tensors and settings, all from one seed; and what was chosen."""

    def __init__(self, seed: object, number: int) -> None:
        self.r = random.Random(f"{seed}/{number}")
        self.generator = torch.Generator().manual_seed(self.r.getrandbits(60))
        self.log: list[str] = []

    def note(self, what: str, value: Any) -> Any:
        text = f"{what}: {describe(value)}"
        self.log.append(text)
        if LIVE is not None:
            LIVE.write(text.encode("ascii", "backslashreplace")[:10_000] + b"\n\0")
            LIVE.seek(-1, os.SEEK_CUR)
        return value

    def chance(self, of: float) -> bool:
        return self.r.random() < of

    # -- Numbers and shapes --

    def integers(self, shape: Sequence[int], density: float = 1.0) -> Tensor:
        """-1, 0 and 1 in float64."""
        values = torch.randint(-1, 2, tuple(shape), generator=self.generator, dtype=torch.float64)
        if density >= 1:
            return values
        return values * (torch.rand(tuple(shape), generator=self.generator) < density)

    def size(self, scale: int) -> int:
        if scale == 0 or self.chance(0.15):
            return self.r.choice([0, 1, 1, 2, 2, 3, 4, 5, 7, 8, 9])
        if scale == 1 or self.chance(0.3):
            return self.r.choice([15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65])
        return self.r.choice([95, 96, 97, 127, 128, 129, 130, 200, 256, 257, 300, 500])

    def rows(self, scale: int) -> int:
        if scale == 0:
            return self.size(0)
        if scale == 1:
            return self.r.choice([0, 1, 5, 6, 7, 11, 12, 13, 16, 23, 24, 25, 47, 48, 49, 95, 97])
        return self.r.choice([1, 2, 7, 16, 64, 96, 239, 240, 241, 300, 480, 481, 500, 1100, 2100])

    def shape(self, rows: int, features: int) -> list[int]:
        """(*, features) with so many rows, of rank 1 to 4."""
        if rows == 1 and self.chance(0.3):
            return [features]
        leading = [rows]
        while len(leading) < 3 and self.chance(0.25):
            divisors = [d for d in range(1, 10) if leading[-1] % d == 0]
            divisor = self.r.choice(divisors)
            leading = [*leading[:-1], divisor, leading[-1] // divisor]
        self.r.shuffle(leading)
        return [*leading, features]

    # -- Layouts --

    def placed(self, t: Tensor, special: bool = True) -> Tensor:
        """t in some layout, which may change its values."""
        if t.layout is not torch.strided or self.chance(0.5):
            return t
        how = self.r.choice(
            ["transposed", "steps", "inside", "expanded", "overlapping", "parameter"]
            + ["negative", "misaligned", "subclass", "zero"] * (special and self.chance(0.1))
        )
        if how == "transposed" and t.dim() > 1:
            a, b = self.r.sample(range(t.dim()), 2)
            return t.transpose(a, b).contiguous().transpose(a, b)
        if how in ("steps", "inside") and t.dim():
            step = 1 if how == "inside" else self.r.choice([1, 2, 3])
            # PyTorch's own product of bfloat16 slices multiplies what lies beside them by 0.
            around = 7.0 if t.dtype == torch.bfloat16 else math.nan
            larger = torch.full([step * n + 9 for n in t.shape], around, dtype=t.dtype)
            inner = larger[tuple(slice(4, 4 + step * n, step) for n in t.shape)]
            return inner.copy_(t)
        if how == "expanded" and t.numel():
            d = self.r.randrange(t.dim())
            return t.narrow(d, 0, 1).expand(t.shape)
        if how == "overlapping" and t.numel():
            strides = [self.r.choice([0, 1, 1, 2]) for _ in t.shape]
            needed = 1 + sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True))
            flat = t.flatten().repeat(-(-(needed + 3) // t.numel()))
            return flat.as_strided(t.shape, strides, 3)
        if how == "parameter":
            return nn.Parameter(t, requires_grad=False)
        if how == "negative":
            return torch._neg_view(-t)
        if how == "misaligned" and 0 < t.numel() < 1000 and not SANITIZED:
            raw = bytearray(1) + bytes(t.flatten().clone().untyped_storage().tolist())
            return torch.frombuffer(raw, dtype=t.dtype, offset=1).view(t.shape)
        if how == "subclass":
            return t.as_subclass(Subclass)
        if how == "zero" and t.numel():
            return torch._efficientzerotensor(t.shape, dtype=t.dtype)
        return t

    # -- Settings --

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Threads, instruction set and backend."""
        threads = self.r.choice([1, 1, 2])
        self.backend = name = self.r.choice([*support.BACKENDS, support.BACKENDS[0]])
        self.note("threads, backend", (threads, name))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            if INSTRUCTION_SETS:
                R._choose_instruction_set(
                    self.note("instruction set", self.r.choice(INSTRUCTION_SETS))
                )
            with relu_mlp.backend(name):
                yield
        finally:
            torch.set_num_threads(before)

    def mode(self, choices: Sequence[str] = ()) -> Callable[[], Any]:
        """A mode of PyTorch, as what makes a context."""
        self.mode_name = self.note("mode", self.r.choice(choices or [*MODES]))
        return MODES[self.mode_name]


INSTRUCTION_SETS = R._supported_instruction_sets().split()


class Subclass(Tensor):
    """What a subclass without a meaning of its own is."""


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


MODES: dict[str, Callable[[], Any]] = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "deterministic": deterministic,
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
}
PLAIN_MODES = ["grad", "no_grad", "inference", "deterministic"]


class Network:
    """x, weights, biases (None for a missing one), an activation and a gradient for y."""

    def __init__(self, case: Case, dtypes: Sequence[torch.dtype] = DTYPES, scale: int = -1) -> None:
        r = case.r
        if scale < 0:
            scale = r.choices([0, 1, 2], [20, 6, 1])[0]
        self.dtype = r.choice(dtypes)
        while True:
            layers = r.choice([1, 1, 2, 2, 2, 3, 3, 4])
            rows, sizes = case.rows(scale), [case.size(scale) for _ in range(layers + 1)]
            if layers == 1 or (rows * max(sizes) <= 150_000 and max(sizes) <= 300):
                break
        info = torch.finfo(self.dtype)
        self.values = r.choices(
            ["integers", "not finite", "subnormal", "large", "real"], [12, 3, 1, 1, 4]
        )[0]
        self.unit = 1.0
        if self.values == "subnormal":
            self.unit = info.smallest_normal * info.eps
        elif self.values == "large":
            self.unit = 2.0 ** (math.frexp(info.max)[1] - PRECISION[self.dtype] - 1)

        def numbers(shape: list[int], density: float = 1, unit: float = 1) -> Tensor:
            if self.values == "real":
                values = torch.randn(shape, generator=case.generator, dtype=torch.float64)
                values /= max(1, shape[-1]) ** 0.5
            else:
                values = case.integers(shape, density) * unit
            if self.values == "not finite" and values.numel() and case.chance(0.4):
                at = r.randrange(values.numel())
                values.view(-1)[at] = r.choice([math.nan, math.inf, -math.inf])
            return case.placed(values.to(self.dtype))

        pairs = [*itertools.pairwise(sizes)]
        self.x = numbers(case.shape(rows, sizes[0]), unit=self.unit)
        self.weights = [numbers([n, m], min(1.0, 6 / max(1, n, m))) for m, n in pairs]
        bias = r.choice(["all", "all", "none", "some"])
        self.biases: list[Tensor | None] | None = None
        if bias != "none":
            self.biases = [
                None if bias == "some" and case.chance(0.5) else numbers([n], unit=self.unit)
                for n in sizes[1:]
            ]
        self.activation = r.choice([None, None, "relu", "relu", "sigmoid", "tanh"])
        self.grad = numbers([*self.x.shape[:-1], sizes[-1]], min(1.0, 60 / max(1, rows)))
        case.note("values", self.values)
        case.note("x", self.x)
        case.note("weights", self.weights)
        case.note("biases", self.biases)
        case.note("output_activation, grad_output", (self.activation, self.grad))

    @property
    def name(self) -> str:
        return functional.activation_name(self.activation)

    def operands(self) -> list[Any]:
        """x, weights and biases as the operators take them."""
        missing = ops.NO_TENSOR
        return [self.x, self.weights, [missing if b is None else b for b in self.biases or []]]

    def is_exact(self, dtype: torch.dtype) -> bool:
        """Whether no sum in either pass is rounded in this dtype."""
        if self.activation in ("sigmoid", "tanh") or self.values == "real":
            return False
        if self.values == "subnormal" and self.dtype == torch.bfloat16:
            return False  # products in pairs take them for 0

        def magnitude(t: Tensor) -> Tensor:
            return t.detach().double().nan_to_num(0, 0, 0).abs()

        a = [reference.as_matrix(magnitude(self.x)) / self.unit]
        weights = [*map(magnitude, self.weights)]
        largest = 1.0
        for layer, weight in enumerate(weights):
            bias = self.biases[layer] if self.biases else None
            a.append(a[-1] @ weight.T + (0 if bias is None else magnitude(bias) / self.unit))
        delta = reference.as_matrix(magnitude(self.grad)) + 1
        for layer in reversed(range(len(weights))):
            sums = [a[layer + 1], delta, delta.T @ a[layer], delta.sum(0)]
            largest = max([largest, *(float(t.max()) for t in sums if t.numel())])
            delta = delta @ weights[layer]
        largest = max([largest, *(float(t.max()) for t in [delta] if t.numel())])
        return largest < 2 ** PRECISION[dtype]


# -- Comparisons ------------------------------------------------------------------------


def has_storage(t: Tensor) -> bool:
    return (
        (type(t) in ops.PLAIN or type(t) is Subclass)
        and t.layout is torch.strided
        and t.device.type == "cpu"
        and not t.is_nested
        and not t._is_zerotensor()
    )


@contextmanager
def unchanged(*arguments: Any) -> Iterator[None]:
    """Wrong if a tensor among the arguments, or memory around it, is another afterwards."""
    tensors = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]

    def state(t: Tensor) -> Any:
        if not has_storage(t):
            return None
        storage = t.untyped_storage()
        held = torch.empty(0, dtype=torch.uint8).set_(storage).clone() if storage.nbytes() else None
        return held, t.shape, t.stride(), t.dtype, t.requires_grad

    with torch.inference_mode(False):
        before = [*map(state, tensors)]
    yield
    with torch.inference_mode(False):
        for t, old in zip(tensors, before, strict=True):
            new = state(t)
            if old is None:
                continue
            if new[1:] != old[1:] or (old[0] is not None and not torch.equal(new[0], old[0])):
                raise Wrong(f"an argument was changed: {describe(t)}")


def compare(name: str, found: Any, expected: Any, values: bool = True, rtol: float = 0) -> None:
    """Structure, shapes, dtypes and devices; and, if asked for, every number."""
    if isinstance(expected, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(expected):
            raise Wrong(f"{name}: {describe(found)} should be {describe(expected)}")
        for n, pair in enumerate(zip(found, expected, strict=True)):
            compare(f"{name}[{n}]", *pair, values=values, rtol=rtol)
        return
    if not isinstance(expected, Tensor):
        if found is not expected:
            raise Wrong(f"{name}: {describe(found)} should be {describe(expected)}")
        return
    if not isinstance(found, Tensor):
        raise Wrong(f"{name}: {describe(found)} should be {describe(expected)}")
    whats = [
        (t.dtype, t.device, t.is_nested, None if t.is_nested else t.shape)
        for t in (found, expected)
    ]
    if whats[0] != whats[1]:
        raise Wrong(f"{name}: {describe(found)} should be {describe(expected)}")
    if not values or found.is_meta or found.is_nested:
        return
    wide = torch.complex128 if found.is_complex() else torch.float64
    a, b = (t.detach().to_dense().to(wide) for t in (found, expected))
    if not torch.allclose(a, b, rtol=rtol, atol=rtol, equal_nan=True):
        differ = ~torch.isclose(a, b, rtol=rtol, atol=rtol, equal_nan=True)
        at = tuple(int(n) for n in differ.nonzero()[0])
        raise Wrong(
            f"{name}: {int(differ.sum())} of {differ.numel()} numbers are wrong; "
            f"{at} is {a[at].item()!r} and should be {b[at].item()!r}"
        )


# -- What is done to a valid call -------------------------------------------------------

NAMES = [
    *("", "none", "relu", "sigmoid", "tanh", "gelu", "RELU", "relu ", "relu\0", "\0", "sse", "mse"),
    *("nöne", "\ud800", "\U0001f600", "x" * 100_000, "1", "0", "111", "1111", "01010", "2" * 5),
    *(None, 3, 1.5, b"relu", True, ["relu"], ("1", "1", "1")),
]
NO_TENSORS = [None, 3, 2.5, "x", [], [[1.0]], torch.float32]


OTHER_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
    "mkldnn": Tensor.to_mkldnn,
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.5, 3, torch.qint8),
}


def broken_tensor(case: Case, t: Tensor) -> Any:
    """Another tensor in the place of t, or what is none."""
    r = case.r
    how = r.choice(
        ["dtype", "dtype", "meta", "shape", "shape", "shape", "memory", "memory", "layout", "none"]
    )
    if t.numel() == 0 and how in ("dtype", "layout"):
        how = "shape"  # what is not there may be of any dtype
    if how == "dtype":
        return t.to(r.choice([*OTHER_DTYPES, *DTYPES]))
    if how == "meta":
        return t.to("meta")
    if how == "memory" and case.backend == "extension":
        # PyTorch's own layers raise where a product would read; not all of its functions do.
        t = torch.clone(t.detach().as_subclass(Tensor), memory_format=torch.contiguous_format)
        t.untyped_storage().resize_(r.choice([0, t.untyped_storage().nbytes() // 2]))
        return t
    if how == "layout":
        return OTHER_LAYOUTS[case.note("layout", r.choice([*OTHER_LAYOUTS]))](t)
    if how == "none":
        return r.choice(NO_TENSORS)
    change = r.choice(
        ["larger", "smaller", "drop", "add", "transpose", "flatten", "scalar", "empty"]
    )
    case.note("shape", change)
    d = r.randrange(max(1, t.dim()))
    if change == "scalar" or t.dim() == 0:
        return t.new_ones(())
    if change == "larger":
        return torch.cat([t, t.new_ones([1 if n == d else s for n, s in enumerate(t.shape)])], d)
    if change == "smaller":
        return t.narrow(d, 0, max(0, t.shape[d] - 1))
    if change == "drop":
        return t.select(d, 0) if t.shape[d] else t.sum(d)
    if change == "add":
        return t.unsqueeze(d)
    if change == "transpose":
        return t.mT if t.dim() > 1 else t.unsqueeze(1)
    return t.flatten() if change == "flatten" else t.new_empty(r.choice([[0], [0, 0], [3, 0]]))


def broken_list(case: Case, items: list[Any]) -> Any:
    items = list(items)
    r = case.r
    how = r.choice(["short", "long", "order", "empty", "none", "tensor", "tuple", "many", "string"])
    at = r.randrange(max(1, len(items)))
    if how == "short":
        return items[:at]
    if how == "long":
        return [*items, items[at] if items else torch.ones(1)]
    if how == "order":
        r.shuffle(items)
        return items
    if how == "none":
        return [*items[:at], None, *items[at + 1 :]]
    if how == "tuple":
        return tuple(items)
    if how == "many":
        return items * 50
    return {"empty": [], "tensor": torch.ones(2, 2), "string": "ab"}[how]


def broken(case: Case, arguments: Sequence[Any]) -> list[Any]:
    """The arguments of a call, but for one or two of them."""
    arguments = list(arguments)

    def other_tensor(t: Any) -> Any:
        if not isinstance(t, Tensor) or lacks_memory(t):
            return t
        new = outcome(lambda: broken_tensor(case, t))  # not every tensor can be everything
        return t if isinstance(new, Refused) else new

    for n in case.r.sample(range(len(arguments)), 1 if case.chance(0.8) else 2):
        value = arguments[n]
        if isinstance(value, list) and value and case.chance(0.6):
            at = case.r.randrange(len(value))
            arguments[n] = [*value[:at], other_tensor(value[at]), *value[at + 1 :]]
        elif isinstance(value, (list, tuple)):
            arguments[n] = broken_list(case, list(value))
        elif isinstance(value, Tensor):
            arguments[n] = other_tensor(value)
        elif isinstance(value, bool):
            arguments[n] = case.r.choice([None, 2, "yes", not value])
        elif isinstance(value, str) and set(value) <= {"0", "1"} and case.chance(0.7):
            at = case.r.randrange(max(1, len(value)))
            new = case.r.choice(["", "0", "1", "2", "01", "\0", "\u00e9", "1" * 99])
            arguments[n] = value[:at] + new + value[at + case.r.randrange(2) :]
        else:
            arguments[n] = case.r.choice(NAMES)
        case.note(f"broken, argument {n}", arguments[n])
    return arguments


def lacks_memory(*arguments: Any) -> bool:
    """Whether a tensor among them has elements beyond its storage."""
    for t in tree_leaves(arguments):
        if isinstance(t, Tensor) and has_storage(t) and t.numel():
            last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            end = (t.storage_offset() + last + 1) * t.element_size()
            if end > t.untyped_storage().nbytes():
                return True
    return False


# -- The raw operators ------------------------------------------------------------------


def wide(value: Any) -> Any:
    """A tensor's numbers in float64."""
    if isinstance(value, bytes):
        return value.decode()  # a str to an operator, too
    if not isinstance(value, Tensor):
        return value
    value = value.detach().to_dense() if value.layout is not torch.strided else value.detach()
    return value.as_subclass(Tensor).to(torch.complex128 if value.is_complex() else torch.float64)


def judge(case: Case, operator: str, arguments: list[Any], valid: bool, exact: bool) -> str:
    """Calls a raw operator, and the reference in float64 beside it."""
    case.note("operator", operator)
    mode = case.mode(PLAIN_MODES)
    with unchanged(arguments), mode():
        found = outcome(lambda: getattr(R, operator)(*arguments))
    if isinstance(found, Refused):
        if valid:
            raise Wrong(f"a valid call was refused: {found!r}")
        check_words(found)
        return "refused"
    if lacks_memory(arguments):
        some = [t for t in tree_leaves(found) if isinstance(t, Tensor) and t.numel()]
        if some and all(t.numel() for t in tree_leaves(arguments) if isinstance(t, Tensor)):
            raise Wrong("a tensor has no memory, and the call was answered")
        return "without elements"
    if any(isinstance(t, Tensor) and t.is_quantized for t in tree_leaves(arguments)):
        raise Wrong("quantized numbers were answered")
    expected = outcome(lambda: getattr(reference, operator)(*tree_map(wide, arguments)))
    if isinstance(expected, Refused):
        raise Wrong(f"answered with {describe(found)}, but {expected!r}")
    dtype = next(t.dtype for t in tree_leaves(arguments) if isinstance(t, Tensor))
    expected = tree_map(
        lambda t: t.to(dtype) if isinstance(t, Tensor) and not t.is_meta else t, expected
    )
    if any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves([arguments, found])):
        shapes = [[t.shape for t in tree_leaves(answer)] for answer in (found, expected)]
        if shapes[0] != shapes[1]:
            raise Wrong(f"shapes {shapes[0]} should be {shapes[1]}")
        return "right"
    compare(operator, found, expected, values=exact)
    return "right"


def judged(
    case: Case, net: Network, operator: str, arguments: list[Any], exact: bool = True
) -> str:
    """Judges a valid call, or what becomes of it."""
    valid = case.chance(0.5)
    if not valid:
        arguments = broken(case, arguments)
    elif case.chance(0.06):
        case.note("all on", "meta")
        arguments = tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, arguments)
        valid = case.backend != "extension"  # that has no kernels for it
    # What is known of the numbers need not hold for others in their place.
    exact = exact and valid and net.is_exact(net.dtype)
    return judge(case, operator, arguments, valid, exact)


def op_forward(case: Case) -> str:
    net = Network(case)
    operands = net.operands()
    if net.biases and case.chance(0.2):  # any tensor without elements stands for a missing bias
        missing = torch.empty(0, dtype=case.r.choice([*DTYPES, torch.int64]))
        missing = missing.to("meta") if case.chance(0.2) else missing
        operands[2] = [missing if b is None else b for b in net.biases]
        case.note("placeholder", missing)
        if missing.is_meta:
            return judge(case, "relu_mlp", [*operands, net.name], False, net.is_exact(net.dtype))
    if case.chance(0.5):
        return judged(case, net, "relu_mlp", [*operands, net.name])
    return judged(case, net, "forward", [*operands, net.name, case.chance(0.7)])


def random_needs(case: Case, net: Network) -> str:
    return "".join(case.r.choice("011") for _ in range(1 + 2 * len(net.weights)))


def op_backward(case: Case) -> str:
    net = Network(case)
    with torch.no_grad():
        y, hidden = R.forward(*net.operands(), net.name, True)
    needs = random_needs(case, net)
    kept = reference.is_kept(net.name, needs)
    everything = [net.x, y, *net.weights, *hidden]
    saved = [case.placed(t) for t, keep in zip(everything, kept, strict=True) if keep]
    case.note("saved, needs", (saved, needs))
    # Rounded, or dealt out anew, they need not be small integers.
    exact = all(
        float(t.double().abs().nan_to_num(0, 0, 0).max()) / net.unit < 64
        for t in hidden
        if t.numel()
    )
    return judged(case, net, "backward", [net.grad, saved, net.name, needs], exact)


def op_recompute_backward(case: Case) -> str:
    net = Network(case)
    arguments = [net.grad, *net.operands(), net.name, random_needs(case, net)]
    return judged(case, net, "recompute_backward", arguments)


def op_loss_and_grads(case: Case) -> str:
    net = Network(case)
    loss = case.r.choice(["sse", "half_sse", "mse"])
    target = net.grad
    if net.is_exact(net.dtype):
        with torch.no_grad(), relu_mlp.backend("reference"):
            target = case.placed(R.relu_mlp(*net.operands(), net.name) - net.grad)
    case.note("target, loss", (target, loss))
    small = target.numel() == 0 or float(wide(target).nan_to_num(0, 0, 0).abs().max()) < 64
    exact = small and net.unit == 1 and loss != "mse" and target.numel() < 64
    return judged(
        case, net, "loss_and_grads", [net.x, target, *net.operands()[1:], loss, net.name], exact
    )


# -- The public functions ---------------------------------------------------------------


def native(x, weights, biases=None, *, output_activation=None, recompute=False):
    functional.activation_name(output_activation)  # ValueError for what is none
    return support.native(x, weights, biases, output_activation)


def operator(x, weights, biases=None, *, output_activation=None, recompute=False):
    """`torch.ops.relu_mlp.relu_mlp` in the place of the function."""
    biases = [ops.NO_TENSOR if bias is None else bias for bias in biases or []]
    return R.relu_mlp(x, weights, biases, functional.activation_name(output_activation))


def own_leaves(case: Case, arguments: Any) -> Callable[[], Any]:
    """The same tensors once more, in the same memory; some of them leaves that need gradients."""
    needing = [
        isinstance(t, Tensor) and t.is_floating_point() and case.chance(0.6)
        for t in tree_leaves(arguments)
    ]

    def make() -> Any:
        needs = iter(needing)

        def leaf(t: Any) -> Any:
            need = next(needs)
            return t.detach().requires_grad_(need) if isinstance(t, Tensor) else t

        return tree_map(leaf, arguments)

    return make


def with_gradients(
    call: Callable[..., Any], arguments: Any, grad: Callable[[Tensor], Tensor]
) -> Any:
    """y, and the gradients of all leaves that need one."""
    y = call(*arguments)
    leaves = [t for t in tree_leaves(arguments) if isinstance(t, Tensor) and t.requires_grad]
    if not leaves or not y.requires_grad:
        return y, []
    return y, list(torch.autograd.grad(y, leaves, grad(y), allow_unused=True))


def bounded(case: Case, net: Network, found: Any, arguments: Any) -> None:
    """Holds y and the gradients of real numbers to the bounds of rounding."""
    y, grads = found
    x, grad = (reference.as_matrix(t) for t in (net.x, net.grad))
    if not 0 < x.shape[0] <= 2100 or any(w.numel() == 0 for w in net.weights):
        return
    implementation = functional.implementation_for(net.x)
    again, hidden = support.hidden_of(implementation, x, net.weights, net.biases, net.activation)
    exact = support.Exact(x, net.weights, net.biases, net.activation, hidden, again)
    named = exact.backward(grad)
    names = ["x", *(f"weights[{n}]" for n in range(len(net.weights)))]
    names += [f"biases[{n}]" for n, b in enumerate(net.biases or []) if b is not None]
    leaves = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
    wanted = [n for n, t in zip(names, leaves, strict=True) if t.requires_grad] if grads else []
    try:
        exact.y.check(y.detach().reshape(exact.y.value.shape), "y")
        for name, g in zip(wanted, grads, strict=True):
            named[name].check(g.reshape(named[name].value.shape), f"the gradient of {name}")
    except AssertionError as error:
        raise Wrong(str(error)) from None


def public_relu_mlp(case: Case) -> str:
    net = Network(case)
    arguments = [net.x, net.weights, net.biases, net.activation]
    valid = case.chance(0.65)
    if not valid:
        arguments = broken(case, arguments)
    make = own_leaves(case, arguments)
    recompute = case.note("recompute", case.chance(0.3))
    mode = case.mode()
    grad = net.grad
    if not valid or "autocast" in case.mode_name:
        values = case.integers(net.grad.shape)

        def grad_of(y: Tensor) -> Tensor:
            return (values if values.shape == y.shape else torch.ones(y.shape)).to(y)

    else:

        def grad_of(y: Tensor) -> Tensor:
            return grad

    def run(function: Callable[..., Tensor]) -> Any:
        leaves = make()
        with mode():
            return leaves, outcome(
                lambda: with_gradients(
                    lambda x, w, b, a: function(x, w, b, output_activation=a, recompute=recompute),
                    leaves,
                    grad_of,
                )
            )

    is_native = any(type(t) is Subclass for t in tree_leaves(arguments))
    if lacks_memory(arguments) and (is_native or "autocast" in case.mode_name):
        return "left out"  # PyTorch's own layers and casts read such memory
    function = relu_mlp.relu_mlp
    if valid and "autocast" not in case.mode_name and case.chance(0.25):
        function = case.note("as", operator)
    with unchanged(arguments):
        leaves, found = run(function)
    if isinstance(found, Refused) and not valid:
        check_words(found)
    if lacks_memory(arguments):
        some = all(t.numel() for t in tree_leaves(arguments) if isinstance(t, Tensor))
        if some and not isinstance(found, Refused):
            raise Wrong("a tensor has no memory, and the call was answered")
        return "refused" if isinstance(found, Refused) else "without elements"
    _, expected = run(native)
    if isinstance(found, Refused):
        if not isinstance(expected, Refused):
            if valid:
                raise Wrong(f"the native layers serve what was refused: {found!r}")
        elif valid and not issubclass(type(found.error), type(expected.error)):
            raise Wrong(f"{found!r}, natively {expected!r}")
        return "refused"
    if isinstance(expected, Refused):
        raise Wrong(f"answered with {describe(found)}, natively {expected!r}")
    dtype = found[0].dtype if isinstance(found[0], Tensor) else net.dtype
    lowest = min((dtype, net.dtype), key=lambda t: PRECISION.get(t, 0))
    known = valid and (net.unit == 1 or "autocast" not in case.mode_name)
    exact = known and net.is_exact(lowest)
    compare("relu_mlp", found, expected, values=exact)
    if known and net.values == "real" and "autocast" not in case.mode_name:
        bounded(case, net, found, leaves)
    return "right"


def public_loss_and_grads(case: Case) -> str:
    """In float64, where rounding hides nothing; op_loss_and_grads does the other dtypes."""
    net = Network(case, [torch.float64])
    loss = case.r.choice(["sse", "half_sse", "mse"])
    arguments: list[Any] = [net.x, net.grad, net.weights, net.biases, loss, net.activation]
    valid = case.chance(0.6)
    if not valid:
        arguments = broken(case, arguments)

    def call(x, target, weights, biases, loss, activation):
        return relu_mlp.loss_and_grads(
            x, target, weights, biases, loss=loss, output_activation=activation
        )

    mode = case.mode()
    with unchanged(arguments), mode():
        found = outcome(lambda: call(*arguments))
    if isinstance(found, Refused):
        if valid:
            raise Wrong(f"a valid call was refused: {found!r}")
        check_words(found)
        return "refused"
    if lacks_memory(arguments):
        if all(t.numel() for t in tree_leaves(arguments) if isinstance(t, Tensor)):
            raise Wrong("a tensor has no memory, and the call was answered")
        return "without elements"
    x, target, weights, biases, loss, activation = tree_map(wide, arguments)
    if not valid:
        return "answered"
    parameters = [t.requires_grad_() for t in [*weights, *(biases or [])] if t is not None]
    error = native(x, weights, biases, output_activation=activation) - target
    value = error.square().mean() if loss == "mse" else error.square().sum()
    value = value / 2 if loss == "half_sse" else value
    grads = iter(torch.autograd.grad(value, parameters, materialize_grads=True))
    of_weights = tuple(next(grads) for _ in weights)
    of_biases = biases and tuple(None if b is None else next(grads) for b in biases)
    finite = net.values in ("integers", "real")
    compare("loss", found.loss, value.detach(), finite, 1e-9)
    compare("gradients", found[1:], (of_weights, of_biases), finite, 1e-9)
    return "right"


def jacobian_and_linearize(case: Case) -> str:
    net = Network(case, [torch.float64], scale=0)
    arguments = [net.x, net.weights, net.biases]
    valid = case.chance(0.6)
    if not valid:
        arguments = broken(case, arguments)
    mode = case.mode()
    is_jacobian = case.note("jacobian", case.chance(0.5))
    function = relu_mlp.jacobian if is_jacobian else relu_mlp.linearize
    with unchanged(arguments), mode():
        found = outcome(lambda: function(*arguments, output_activation=net.activation))
    if isinstance(found, Refused):
        if valid and not (is_jacobian and net.x.dim() != 2):
            raise Wrong(f"a valid call was refused: {found!r}")
        check_words(found)
        return "refused"
    if lacks_memory(arguments):
        if all(t.numel() for t in tree_leaves(arguments) if isinstance(t, Tensor)):
            raise Wrong("a tensor has no memory, and the call was answered")
        return "without elements"
    if not valid or net.values not in ("integers", "real"):
        return "answered"
    x, weights, biases = tree_map(wide, arguments)
    present = [n for n, b in enumerate(biases or []) if b is not None]

    def y(*parameters: Tensor) -> Tensor:
        of_biases = [None] * len(weights)
        for n, bias in zip(present, parameters[len(weights) :], strict=True):
            of_biases[n] = bias
        return native(x, parameters[: len(weights)], of_biases, output_activation=net.activation)

    parameters = (*weights, *(biases[n] for n in present))
    if is_jacobian:
        expected = torch.func.jacrev(y, tuple(range(len(parameters))))(*parameters)
        flat = [t for t in tree_leaves(found) if t is not None]
        compare("jacobian", flat, list(expected), rtol=1e-9)
        return "right"
    grad = wide(net.grad)
    compare("y", found.y, y(*parameters).detach(), rtol=1e-9)
    flat = [t for t in tree_leaves(found.vjp(grad)) if t is not None]
    compare("vjp", flat, list(torch.autograd.functional.vjp(y, parameters, grad)[1]), rtol=1e-9)
    change = tuple(case.integers(p.shape) for p in parameters)
    tangent = (
        change[: len(weights)],
        None if biases is None else [None] * len(weights),
    )
    for n, bias in zip(present, change[len(weights) :], strict=True):
        tangent[1][n] = bias
    compare("jvp", found.jvp(tangent), torch.autograd.functional.jvp(y, parameters, change)[1],
            rtol=1e-9)  # fmt: skip
    return "right"


def check_gradients(case: Case) -> str:
    net = Network(case, scale=0)
    arguments = [net.x, net.grad, net.weights, net.biases]
    valid = case.chance(0.6)
    if not valid:
        arguments = broken(case, arguments)
    loss = case.r.choice(["sse", "half_sse", "mse"])
    mode = case.mode()
    with unchanged(arguments), mode():
        found = outcome(
            lambda: relu_mlp.check_gradients(
                *arguments, loss=loss, output_activation=net.activation
            )
        )
    if isinstance(found, Refused):
        if valid and net.values in ("integers", "real"):
            raise Wrong(f"a valid call was refused: {found!r}")
        check_words(found)
        return "refused"
    if isinstance(outcome(lambda: str(found)), Refused):
        if valid:
            raise Wrong("the report cannot be printed")
        return "refused"
    # Of integers, many are at a kink.
    if valid and net.values == "real" and not found.ok:
        raise Wrong(f"right gradients are not ok:\n{found}")
    return "right"


def transforms(case: Case) -> str:
    """Transforms of transforms, in float64, against the same of the native layers."""
    net = Network(case, [torch.float64], scale=0)
    if net.x.dim() < 2:
        net.x = net.x.new_ones(3, net.x.shape[-1])
    # Native transforms make NaN of 0 times infinity where a tangent is 0.
    x, weights, biases = tree_map(
        lambda t: wide(t).nan_to_num(0, 0, 0) if isinstance(t, Tensor) else t,
        [net.x, net.weights, net.biases],
    )
    chain = [case.r.choice(["vmap", "grad", "jvp", "jacrev", "jacfwd", "none"]) for _ in range(2)]
    recompute = case.chance(0.3)
    at_weight = case.chance(0.5)
    case.note("transforms, recompute, at a weight", (chain, recompute, at_weight))
    func = torch.func

    def apply(name: str, f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        if name == "vmap":
            return func.vmap(f) if not at_weight else lambda p: func.vmap(f)(torch.stack([p, p]))
        if name == "grad":
            return func.grad(lambda p: f(p).square().sum())
        if name == "jvp":
            return lambda p: func.jvp(f, (p,), (torch.ones_like(p),))[1]
        if name == "jacrev":
            return func.jacrev(f)
        return func.jacfwd(f) if name == "jacfwd" else f

    def run(network: Callable[..., Tensor]) -> Any:
        def at(p: Tensor) -> Tensor:
            operands = (x, [p, *weights[1:]]) if at_weight else (p, weights)
            options = {"output_activation": net.activation, "recompute": recompute}
            return network(*operands, biases, **options)

        f: Callable[[Tensor], Tensor] = at
        for name in chain:
            f = apply(name, f)
        return outcome(lambda: f(weights[0] if at_weight else x))

    found, expected = run(relu_mlp.relu_mlp), run(native)
    if isinstance(found, Refused):
        if not isinstance(expected, Refused):
            raise Wrong(f"the native layers serve what was refused: {found!r}")
        return "refused"
    if isinstance(expected, Refused):
        raise Wrong(f"answered with {describe(found)}, natively {expected!r}")
    compare("the derivative", found, expected, rtol=1e-9)
    return "right"


def fake(case: Case) -> str:
    """Shapes and dtypes under FakeTensorMode, with gradients."""
    net = Network(case)
    make = own_leaves(case, [net.x, net.weights, net.biases])
    recompute = case.note("recompute", case.chance(0.3))

    def run(function: Callable[..., Tensor]) -> Any:
        mode = FakeTensorMode()
        fakes = tree_map(lambda t: mode.from_tensor(t) if isinstance(t, Tensor) else t, make())
        with mode:
            return outcome(
                lambda: with_gradients(
                    lambda x, w, b: function(
                        x, w, b, output_activation=net.activation, recompute=recompute
                    ),
                    fakes,
                    torch.ones_like,
                )
            )

    found, expected = run(relu_mlp.relu_mlp), run(native)
    if isinstance(found, Refused) != isinstance(expected, Refused):
        raise Wrong(f"{describe(found)}, natively {describe(expected)}")
    if isinstance(found, Refused):
        return "refused"
    compare("shapes", found, expected, values=False)
    return "right"


# -- Modules ----------------------------------------------------------------------------


def scaled(module: nn.Module, _: Any, y: Tensor) -> Tensor:
    return 2 * y


def doubled(module: nn.Module, x: tuple[Tensor]) -> tuple[Tensor]:
    return (2 * x[0],)


def negative(linear: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, -linear.weight)


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def random_sequential(case: Case, is_run: bool) -> nn.Sequential:
    """Children that are a network, or nearly, or have some within."""
    r = case.r
    width = case.size(0)
    children: list[nn.Module] = []
    for _ in range(r.choice([1, 2, 2, 3, 4])):
        out = max(1, case.size(0))
        kind = OwnLinear if not is_run and case.chance(0.1) else nn.Linear
        children.append(kind(width, out, bias=case.chance(0.7)))
        children.append(nn.ReLU(inplace=case.chance(0.3)))
        if not is_run and case.chance(0.3):
            children.append(
                r.choice([nn.Identity(), nn.Dropout(0.5), nn.Flatten(0, -2), nn.Tanh()])
            )
        if not is_run and case.chance(0.15):
            children.append(random_sequential(case, True))
            children.append(nn.Linear([*children[-1].modules()][-1].out_features, out)
                            if isinstance([*children[-1].modules()][-1], nn.Linear)
                            else nn.Identity())  # fmt: skip
        width = out
    if case.chance(0.5):
        children.pop()
    if case.chance(0.3) and (isinstance(children[-1], nn.Linear) or not is_run):
        children.append(r.choice([nn.Sigmoid(), nn.Tanh()]))
    net = nn.Sequential(*children).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(case.integers(parameter.shape))
    return net


def change(case: Case) -> Callable[[nn.Module], Any]:
    """Something that people do to a model, the same to every copy."""
    r = case.r
    n = r.randrange(99)
    how = case.note(
        "change",
        r.choice(
            [
                *("hook", "pre_hook", "weight", "no_bias", "data", "forward", "frozen", "child"),
                *("state", "_parameters", "deepcopy", "pickle", "in_place", "eval", "float"),
            ]
        ),
    )

    def linears(model: nn.Module) -> list[nn.Linear]:
        return [m for m in model.modules() if type(m) is nn.Linear]

    def apply(model: nn.Module) -> nn.Module:
        some = linears(model)
        linear = some[n % len(some)] if some else nn.Linear(1, 1).double()
        if how == "hook":
            linear.register_forward_hook(scaled)
        elif how == "pre_hook":
            linear.register_forward_pre_hook(doubled)
        elif how == "weight":
            linear.weight = nn.Parameter(2 * linear.weight.detach())
        elif how == "no_bias":
            linear.bias = None
        elif how == "data":
            linear.weight.data = 2 * linear.weight.data
        elif how == "forward":
            linear.forward = functools.partial(negative, linear)
        elif how == "frozen":
            linear.requires_grad_(False)
        elif how == "state":
            model.load_state_dict({k: -v for k, v in model.state_dict().items()})
        elif how == "_parameters":
            linear._parameters["weight"] = nn.Parameter(3 * linear.weight.detach())
        elif how == "deepcopy":
            return copy.deepcopy(model)
        elif how == "pickle":
            return pickle.loads(pickle.dumps(model))
        elif how == "in_place":
            with torch.no_grad():
                linear.weight.add_(1)
        elif how == "eval":
            model.eval()
        elif how == "float":
            model.float()
        elif how == "child":
            for m in model.modules():
                names = [name for name, child in m.named_children() if type(child) is nn.ReLU]
                if names and isinstance(m, nn.Sequential):
                    setattr(m, names[n % len(names)], nn.Identity())
                    break
        return model

    return apply


def run_twins(case: Case, twins: list[nn.Module], x: Tensor) -> str:
    """The same calls of a fused model and of its native twin, with changes between."""
    for step in range(case.r.choice([1, 2, 3])):
        if step:
            alter = change(case)
            twins = [alter(model) for model in twins]
        mode = case.mode()
        dtype = next((p.dtype for p in twins[1].parameters()), x.dtype)

        def call(model: nn.Module, dtype: torch.dtype = dtype, step: int = step) -> Any:
            torch.manual_seed(step)  # for dropout
            model.zero_grad()
            y = model(x.detach().clone().to(dtype))
            if y.requires_grad:
                y.backward(torch.ones_like(y))
            return y, [p.grad for p in model.parameters()]

        with mode():
            found, expected = (outcome(functools.partial(call, model)) for model in twins)
        if isinstance(found, Refused) != isinstance(expected, Refused):
            raise Wrong(f"call {step}: {describe(found)}, natively {describe(expected)}")
        if not isinstance(found, Refused):
            loose = "autocast" in case.mode_name or dtype == torch.float32
            compare(f"call {step}", found, expected, not loose, 1e-9)
    return "right"


def module(case: Case) -> str:
    native_net = random_sequential(case, True)
    case.note("module", native_net)
    net = outcome(lambda: relu_mlp.ReluMLP.from_sequential(copy.deepcopy(native_net)))
    if isinstance(net, Refused):
        raise Wrong(f"a run was refused: {net!r}")
    if [*net.state_dict()] != [*native_net.state_dict()]:
        raise Wrong("other keys of the state_dict")
    net.recompute = case.chance(0.3)
    width = native_net[0].in_features + (case.chance(0.1))
    x = case.placed(case.integers(case.shape(case.rows(0), width)), False)
    case.note("x", x)
    return run_twins(case, [net, native_net], x)


def fuse(case: Case) -> str:
    native_net = random_sequential(case, False)
    if case.chance(0.5):
        native_net = nn.Sequential(nn.Identity(), native_net)
    net = copy.deepcopy(native_net)
    if case.chance(0.3):
        alter = change(case)
        net, native_net = alter(net), alter(native_net)
    case.note("module", native_net)
    fused = outcome(lambda: relu_mlp.fuse(net))
    if fused is not net:
        raise Wrong(f"fuse gave {fused!r}")
    if [*net.state_dict()] != [*native_net.state_dict()]:
        raise Wrong("other keys of the state_dict")
    width = next(m for m in native_net.modules() if isinstance(m, nn.Linear)).in_features
    x = case.placed(case.integers([case.rows(0), max(0, width)]), False)
    case.note("x", x)
    return run_twins(case, [net, native_net], x)


def from_sequential(case: Case) -> str:
    """Any module: what is served is served as natively, and the rest is refused unchanged."""
    native_net = random_sequential(case, case.chance(0.5))
    before = copy.deepcopy(native_net)
    if case.chance(0.6):
        alter = change(case)
        native_net, before = alter(native_net), alter(before)
    case.note("module", native_net)
    given: Any = case.r.choice([None, 3, nn.Linear(2, 2)]) if case.chance(0.1) else native_net
    net = outcome(lambda: relu_mlp.ReluMLP.from_sequential(given))
    if isinstance(net, Refused):
        check_words(net)
        return "refused"
    x = case.integers([case.rows(0), before[0].in_features])
    return run_twins(case, [net, before], x)


#: What a case may be, and how often.
KINDS: dict[Callable[[Case], str], int] = {
    op_forward: 6,
    op_backward: 6,
    op_recompute_backward: 4,
    op_loss_and_grads: 4,
    public_relu_mlp: 8,
    public_loss_and_grads: 2,
    jacobian_and_linearize: 2,
    check_gradients: 1,
    transforms: 1,
    fake: 1,
    module: 2,
    fuse: 2,
    from_sequential: 1,
}


def run_case(seed: object, number: int) -> tuple[str, str]:
    """What kind of case it was, and how it ended; Wrong, with all of it in the message."""
    case = Case(seed, number)
    kind = case.r.choices([*KINDS], [*KINDS.values()])[0]
    try:
        with ExitStack() as stack:
            stack.enter_context(case.settings())
            return kind.__name__, kind(case)
    except Exception as error:
        said = str(error) if isinstance(error, Wrong) else traceback.format_exc(limit=-4)
        parts = [f"case {number}, {kind.__name__}: {said}", *case.log]
        raise Wrong("\n    ".join(parts)) from None


# -- Cases in child processes -----------------------------------------------------------


def child(seed: object, numbers: Iterator[int], pipe: int) -> None:
    """Runs cases, and says of each when it begins and how it ended: lines for `watch`."""
    for number in numbers:
        if LIVE is not None:
            LIVE.seek(0)
        os.write(pipe, f"{number}\n".encode())
        try:
            kind, ending = run_case(seed, number)
            os.write(pipe, f"={kind}, {ending}\n".encode())
        except Wrong as error:
            text = str(error).encode("ascii", "backslashreplace").decode().replace("\n", "\\n")
            os.write(pipe, f"!{text}\n".encode())


class Watch:
    """Runs cases first, first + step, ... in a child, and in another after a crash."""

    def __init__(self, options: argparse.Namespace, first: int) -> None:
        self.options, self.next = options, first
        self.counts: collections.Counter[str] = collections.Counter()
        self.found: list[str] = []
        self.begin()

    def begin(self) -> None:
        options = self.options
        end = math.inf if options.cases is None else options.cases
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.notes = mmap.mmap(-1, 1 << 20)
        self.pipe, writing = os.pipe()
        self.pid, self.buffer, self.running = os.fork(), b"", None
        if self.pid == 0:
            global LIVE
            LIVE = self.notes
            os.dup2(self.errors.fileno(), 2)
            status = 1
            try:
                if not SANITIZED:  # they have their own
                    faulthandler.enable()

                def numbers() -> Iterator[int]:
                    number = self.next
                    while number < end and time.time() < options.until:
                        yield number
                        number += options.processes

                child(options.seed, numbers(), writing)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(writing)
        self.heard = time.time()

    def read(self) -> bool:
        """Takes in what the child says; whether there is more to come."""
        data = os.read(self.pipe, 1 << 16)
        self.heard = time.time()
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            text = line.decode()
            if text[0] == "=":
                self.counts[text[1:]] += 1
                self.running = None
            elif text[0] == "!":
                self.report(text[1:].replace("\\n", "\n"))
                self.running = None
            else:
                self.running = int(text)
                self.next = self.running + self.options.processes
        if data:
            return True
        os.close(self.pipe)
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace")[-8000:]
            said = said.split("Extension modules:")[0] + self.notes[:].split(b"\0")[0].decode()
            name = signal.Signals(-code).name if code < 0 else f"status {code}"
            self.report(f"case {self.running}: the process ended with {name}\n{said}")
            if self.running is None:
                return False
            self.begin()
            return True
        return False

    def report(self, text: str) -> None:
        self.counts["WRONG"] += 1
        self.found.append(text)
        number = text.split(",")[0].split(":")[0].removeprefix("case ")
        print(f'{text}\n    make fuzz ARGS="--seed {self.options.seed} --case {number}"\n')
        sys.stdout.flush()

    def stop_if_silent(self) -> None:
        if time.time() - self.heard > self.options.patience:
            os.kill(self.pid, signal.SIGABRT)  # by read() a crash like others
            self.heard = time.time()


def watch(options: argparse.Namespace) -> int:
    """How many cases were wrong."""
    watches = {w.pipe: w for w in (Watch(options, n) for n in range(options.processes))}
    everything = [*watches.values()]
    while watches:
        ready, _, _ = select.select([*watches], [], [], 1)
        for pipe in ready:
            one = watches.pop(pipe)
            if one.read():
                watches[one.pipe] = one
        for one in watches.values():
            one.stop_if_silent()
        if sum(len(w.found) for w in everything) >= options.most:
            for one in watches.values():
                os.kill(one.pid, signal.SIGKILL)
                os.waitpid(one.pid, 0)
            print(f"stopped after {options.most} findings")
            break
    counts = sum((w.counts for w in everything), collections.Counter())
    for name, count in sorted(counts.items()):
        print(f"{count:8}  {name}")
    found = counts["WRONG"]
    print(f"seed {options.seed}: {sum(counts.values())} cases, {found} of them wrong")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Random calls of everything there is to call.")
    parser.add_argument("--seed", default="0", help="any text; by default 0")
    parser.add_argument("--seconds", type=float, default=300, help="how long, by default 300")
    parser.add_argument("--cases", type=int, help="at most so many")
    parser.add_argument("--case", type=int, help="this one alone, in this process")
    parser.add_argument("--processes", type=int, default=1, help="how many at once")
    parser.add_argument("--patience", type=float, default=120, help="seconds a case may take")
    parser.add_argument("--most", type=int, default=20, help="findings after which to stop")
    options = parser.parse_args(arguments)
    options.until = time.time() + options.seconds
    if options.case is None:
        return 1 if watch(options) else 0
    try:
        print(*run_case(options.seed, options.case), sep=": ")
    except Wrong as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
