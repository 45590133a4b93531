"""The verdict on a case: compares answers, exceptions and arguments with the expected ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from relu_mlp import checks, ops

#: The exceptions that PyTorch raises for wrong arguments.
PYTORCH_ERRORS = (RuntimeError, TypeError, ValueError, IndexError)


class Wrong(Exception):
    """A case found a mistake."""


class Refused:
    """A call ended with an exception of a kind that PyTorch raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __repr__(self) -> str:
        return f"{type(self.error).__name__}: {str(self.error)[:300]}"


class Subclass(Tensor):
    """A subclass of Tensor that changes nothing."""


def outcome(call: Callable[[], Any]) -> Any:
    """The result of a call, or `Refused`."""
    try:
        return call()
    except PYTORCH_ERRORS as error:
        return Refused(error)
    except AssertionError as error:
        if "FakeTensor" in str(error):  # PyTorch asserts where fake and real tensors meet
            return Refused(error)
        raise


def check_message(refused: Refused) -> None:
    """An exception must explain something, and name no C++ file."""
    text = str(refused.error).split("Could not run")[0]  # after that, PyTorch lists its own files
    if not str(refused.error) or "csrc/" in text:
        raise Wrong(f"an exception that explains nothing, or names a C++ file: {refused!r}")


def describe(value: Any) -> str:
    """A value in one line. For a tensor: its dtype, shape, layout and device."""
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


def has_storage(t: Tensor) -> bool:
    """Whether the memory of a tensor can be read."""
    return (
        (type(t) in ops.PLAIN or type(t) is Subclass)
        and t.layout is torch.strided
        and t.device.type == "cpu"
        and not t.is_nested
        and not t._is_zerotensor()
    )


def lacks_memory(*arguments: Any) -> bool:
    """Whether a tensor among the arguments has elements beyond its storage."""
    for t in tree_leaves(arguments):
        if isinstance(t, Tensor) and has_storage(t) and t.numel():
            last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            end = (t.storage_offset() + last + 1) * t.element_size()
            if end > t.untyped_storage().nbytes():
                return True
    return False


@contextmanager
def unchanged(*arguments: Any) -> Iterator[None]:
    """Raises `Wrong` if a tensor among the arguments, or memory around it, changes."""
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
    """Compares structure, shapes, dtypes, devices, and with `values` every number."""
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
    kinds = [
        (t.dtype, t.device, t.is_nested, None if t.is_nested else t.shape)
        for t in (found, expected)
    ]
    if kinds[0] != kinds[1]:
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


def ending_without_answer(
    found: Any, arguments: Sequence[Any], valid: bool, answered: bool = True
) -> str | None:
    """The ending of a call that has no answer to compare; None if it has one.

    Args:
        found: the `outcome` of the call.
        valid: whether the call must not be refused.
        answered: whether the answer has elements.
    """
    if isinstance(found, Refused):
        if valid:
            raise Wrong(f"a valid call was refused: {found!r}")
        check_message(found)
        return "refused"
    if lacks_memory(arguments):
        if answered and has_elements(arguments):
            raise Wrong("a tensor has no memory, and the call was answered")
        return "without elements"
    return None


def has_elements(arguments: Any) -> bool:
    """Whether every tensor among the arguments has elements."""
    return all(t.numel() for t in tree_leaves(arguments) if isinstance(t, Tensor))
