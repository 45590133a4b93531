"""Which implementation of the operators serves a call: the library or the reference."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .. import reference
from .._torch_private import call_of
from ..checks import OUT_OF_BOUNDS
from .library import HAS_CUDA, LIBRARY_PATH, LIBRARY_PROBLEM, REMEDY, process, this_thread


class Implementation(Protocol):
    """Serves calls, with functions that have the signatures of the operators."""

    @property
    def relu_mlp(self) -> Callable[..., Tensor]: ...
    @property
    def forward(self) -> Callable[..., tuple[Tensor, list[Tensor]]]: ...
    @property
    def backward(self) -> Callable[..., list[Tensor]]: ...
    @property
    def backward_vjp(self) -> Callable[..., list[Tensor]]: ...
    @property
    def recompute_backward(self) -> Callable[..., list[Tensor]]: ...
    @property
    def loss_and_grads(self) -> Callable[..., tuple[Tensor, list[Tensor]]]: ...


def raising_out_of_memory(call: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `call` raise torch.OutOfMemoryError if a GPU runs out of memory, as PyTorch does.

    The library raises a RuntimeError with PyTorch's message, because LibTorch's C interface passes
    on no exception classes.
    """

    def called(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except RuntimeError as error:
            if str(error).startswith("CUDA out of memory"):
                raise torch.OutOfMemoryError(*error.args) from None
            raise

    return called


def original_call(name: str) -> Callable[..., Any]:
    """The function that PyTorch calls for an operator, before guards.py replaces it."""
    return process.calls.setdefault(name, call_of(getattr(torch.ops.relu_mlp, name).default))


def _call_of(name: str) -> Any:
    call = original_call(name)
    return staticmethod(raising_out_of_memory(call)) if HAS_CUDA else call


def raising_index_error(call: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `call` raise IndexError for a class out of bounds, as PyTorch does."""

    def called(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except RuntimeError as error:
            if str(error).startswith(OUT_OF_BOUNDS):
                raise IndexError(*error.args) from None
            raise

    return called


#: The losses that the library's kernels for CUDA compute.
LOSSES_ON_CUDA = ("sse", "half_sse", "mse")


def loss_between_passes(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` of loss_and_grads where it has the loss; elsewhere the loss between the operators."""

    def called(*arguments: Any) -> Any:
        if arguments[0].is_cuda and arguments[4] not in LOSSES_ON_CUDA:
            return reference.loss_and_grads_between(
                extension.forward, extension.backward, *arguments
            )
        return call(*arguments)

    return called


def _loss_and_grads() -> Any:
    call = raising_index_error(original_call("loss_and_grads"))
    return staticmethod(raising_out_of_memory(loss_between_passes(call)) if HAS_CUDA else call)


class Extension:
    """The operators of the library."""

    relu_mlp = _call_of("relu_mlp")
    forward = _call_of("forward")
    backward = _call_of("backward")
    backward_vjp = _call_of("backward_vjp")
    recompute_backward = _call_of("recompute_backward")
    loss_and_grads = _loss_and_grads()


extension = Extension()

BACKENDS = ("auto", "extension", "reference")


_has_warned = False


class backend:
    """Chooses the implementation of the operators, for the calling thread.

    It is a context manager and a decorator of functions::

        with relu_mlp.backend("reference"):
            y = net(x)

    A backward pass uses the implementation that its forward pass used. The environment variable
    RELU_MLP_BACKEND, read at import, is the default for all threads.

    Args:
        name: one of

            ``"extension"``  the compiled library. Around `torch.export` or a trace it also puts the
                             operator, and not the layers, into the graph.
            ``"reference"``  the same mathematics in Python (reference.py).
            ``"auto"``       the extension where it can serve the call, elsewhere the reference.

    Raises:
        ValueError: for any other name.
        RuntimeError: in a call under ``"extension"``, if the library is missing or can't serve the
            device.
    """

    def __init__(self, name: Literal["auto", "extension", "reference"]) -> None:
        self.name = _checked_backend(name, "name")

    def __enter__(self) -> backend:
        this_thread.outer.append(this_thread.backend)
        this_thread.backend = self.name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        this_thread.backend = this_thread.outer.pop()

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with backend(self.name):  # type: ignore[arg-type]
                return function(*args, **kwargs)

        return wrapped


def _checked_backend(name: str, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be 'auto', 'extension' or 'reference', got {name!r}")
    return name


def current_backend() -> str:
    """The name of the backend in force in this thread."""
    return _checked_backend(this_thread.backend, "RELU_MLP_BACKEND")


def implementation_for(x: Tensor) -> Implementation:
    """The implementation that serves a call on the device of `x`, under the backend in force."""
    if x is None:  # PyTorch passes None on as an operator's first tensor
        raise TypeError("the first argument must be a Tensor, got None")
    name = this_thread.backend
    if name == "auto" or name == "extension":
        if LIBRARY_PATH is not None and (x.is_cpu or (HAS_CUDA and x.is_cuda)):
            return extension
        if name == "extension":
            reason = LIBRARY_PROBLEM or f"it has no kernels for the device {x.device}"
            raise RuntimeError(f"relu_mlp's extension can't serve this call: {reason}. {REMEDY}")
        if LIBRARY_PATH is None:
            _warn_that_library_is_missing()
    else:
        _checked_backend(name, "RELU_MLP_BACKEND")
    return reference


def set_backend(name: str) -> str:
    """Sets the backend of this thread, without a check, and returns the one before."""
    outer, this_thread.backend = this_thread.backend, name
    return outer


@contextmanager
def using(implementation: Implementation) -> Iterator[None]:
    """`backend` for an implementation instead of a name, for a call through the dispatcher."""
    outer = set_backend("reference" if implementation is reference else "extension")
    try:
        yield
    finally:
        set_backend(outer)


def _warn_that_library_is_missing() -> None:
    global _has_warned
    if not _has_warned:
        _has_warned = True
        warnings.warn(
            f"relu_mlp runs in Python, without its C++ extension: {LIBRARY_PROBLEM}. {REMEDY} "
            'RELU_MLP_BACKEND="reference" chooses Python and silences this.',
            UserWarning,
            stacklevel=4,
        )
