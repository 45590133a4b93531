"""Mistakes that are put into the arguments of a valid call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import support

from .case import Case
from .verdict import Refused, lacks_memory, outcome

OTHER_DTYPES = [
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.uint16, torch.bool),
    *(torch.complex64, torch.complex128, torch.complex32),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


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
    """A wrong replacement for t: another tensor, or an object that is not a tensor."""
    r = case.r
    how = r.choice(
        ["dtype", "dtype", "meta", "shape", "shape", "shape", "memory", "memory", "layout", "none"]
    )
    if t.numel() == 0 and how in ("dtype", "layout"):
        how = "shape"  # without elements, any dtype and layout will do
    if how == "dtype":
        return t.to(r.choice([*OTHER_DTYPES, *support.DTYPES]))
    if how == "meta":
        return t.to("meta")
    if how == "memory" and case.backend == "extension":
        # PyTorch's layers raise before a product reads it, but not all of its functions do.
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
    """A wrong replacement for a list."""
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
    """The arguments of a call, with something wrong in one or two of them."""
    arguments = list(arguments)

    def other_tensor(t: Any) -> Any:
        if not isinstance(t, Tensor) or lacks_memory(t):
            return t
        new = outcome(lambda: broken_tensor(case, t))  # it fails for some tensors
        return t if isinstance(new, Refused) else new

    count = 1 if case.chance(0.8) else min(2, len(arguments))
    for n in case.r.sample(range(len(arguments)), count):
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
