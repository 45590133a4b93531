"""NumPy arrays: a function and a backward pass that are written in NumPy.

The function must be differentiated. So it gets arrays that pass every operation of NumPy on to
PyTorch's implementation of it, where autograd records it. The backward pass gets plain arrays.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch_private import torch_numpy


def is_array(value: Any) -> bool:
    """Whether it is a NumPy array or number; does not import NumPy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))


def any_array(values: Any) -> bool:
    each = values.values() if isinstance(values, Mapping) else values
    return isinstance(each, (Sequence, type({}.values()))) and any(map(is_array, each))


class Recorded:
    """A tensor that behaves as a NumPy array, so that autograd sees what NumPy is asked for."""

    def __init__(self, array: Any) -> None:
        self.array = array  # of PyTorch's NumPy

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("out", None)  # `a += b` takes what is returned
        called = getattr(torch_numpy(), ufunc.__name__)
        if method != "__call__":
            called = getattr(called, method)
        return wrapped(called(*unwrapped(args), **unwrapped(kwargs)))

    def __array_function__(
        self, function: Any, types: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        module = torch_numpy()
        for part in function.__module__.split(".")[1:]:
            module = getattr(module, part, module)
        return wrapped(getattr(module, function.__name__)(*unwrapped(args), **unwrapped(kwargs)))

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return function(*tensors(args), **tensors(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.array, name)
        if not callable(found):
            return wrapped(found)
        return lambda *args, **kwargs: wrapped(found(*unwrapped(args), **unwrapped(kwargs)))

    def __getitem__(self, index: Any) -> Any:
        return wrapped(self.array[unwrapped(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.array[unwrapped(index)] = unwrapped(value)

    def __len__(self) -> int:
        return len(self.array)


def _operator(name: str) -> Callable[..., Any]:
    def applied(self: Recorded, *others: Any) -> Any:
        return wrapped(getattr(self.array, name)(*unwrapped(others)))

    return applied


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul", "floordiv", "mod"):
    for _side in ("", "r"):
        setattr(Recorded, f"__{_side}{_name}__", _operator(f"__{_side}{_name}__"))
for _name in ("neg", "pos", "abs", "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "invert"):
    setattr(Recorded, f"__{_name}__", _operator(f"__{_name}__"))


def wrapped(value: Any) -> Any:
    """The arrays in a result as recorded ones."""
    if isinstance(value, torch_numpy().ndarray):
        return Recorded(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map(wrapped, value))
    return value


def unwrapped(value: Any) -> Any:
    """Recorded arrays, plain ones and tensors as arrays of PyTorch's NumPy."""
    if isinstance(value, Recorded):
        return value.array
    if is_array(value) or isinstance(value, Tensor):
        return torch_numpy().asarray(torch.as_tensor(value))
    return _mapped(unwrapped, value)


def tensors(value: Any) -> Any:
    """Recorded arrays as tensors."""
    return value.array.tensor if isinstance(value, Recorded) else _mapped(tensors, value)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: function(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(function, value))
    return value


def function_of_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays, or of tensors, as one of tensors."""

    @functools.wraps(function)
    def of_arrays(*args: Tensor, **kwargs: Tensor) -> Any:
        return tensors(
            function(
                *(Recorded(unwrapped(each)) for each in args),
                **{name: Recorded(unwrapped(each)) for name, each in kwargs.items()},
            )
        )

    return _first_that_works(of_arrays, function) if torch_numpy() is not None else function


def backward_of_arrays(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass of arrays, or of tensors, as one of tensors."""

    @functools.wraps(backward)
    def of_arrays(*args: Tensor, **kwargs: Tensor) -> Any:
        as_arrays = {name: each.detach().cpu().numpy() for name, each in kwargs.items()}
        return backward(*(each.detach().cpu().numpy() for each in args), **as_arrays)

    return _first_that_works(of_arrays, backward)


def _first_that_works(first: Callable[..., Any], second: Callable[..., Any]) -> Callable[..., Any]:
    """The first of two ways to call a function, or the second if that fails.

    Who hands arrays over may still have written a function of tensors.
    """

    @functools.wraps(first)
    def called(*args: Tensor, **kwargs: Tensor) -> Any:
        try:
            with warnings.catch_warnings():  # NumPy deprecates what tensors do with arrays
                warnings.simplefilter("ignore", DeprecationWarning)
                return first(*args, **kwargs)
        except (TypeError, AttributeError, RuntimeError) as error:
            try:
                return second(*args, **kwargs)
            except Exception:
                raise error from None

    return called
