"""What a user passes to `check_gradients`, and what a user's backward function returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .. import checks
from .arrays import is_array
from .differences import Function

Backward = Callable[..., Any]
Inputs = Mapping[str, Any] | Sequence[Any]  #: of tensors or NumPy arrays


def as_tensor(name: str, value: Any) -> Tensor:
    """An input as a tensor."""
    if isinstance(value, Tensor):
        return value
    if is_array(value):
        return torch.tensor(value)
    raise TypeError(f"the input {name} must be a Tensor, got {type(value).__name__}")


def named_inputs(function: Function, inputs: Inputs) -> dict[str, Tensor]:
    """The inputs by name: the names of a mapping, or those of the function's arguments."""
    if isinstance(inputs, Mapping):
        named = dict(inputs)
    elif isinstance(inputs, Sequence):
        names = [f"inputs[{n}]" for n in range(len(inputs))]
        with suppress(TypeError, ValueError):  # no signature, or another number of arguments
            bound = inspect.signature(function).bind(*inputs).arguments
            if len(bound) == len(inputs):  # no *args
                names = list(bound)
        named = dict(zip(names, inputs, strict=True))
    else:
        raise TypeError(
            f"inputs must be a sequence or mapping of Tensors, got {type(inputs).__name__}"
        )
    named = {name: as_tensor(name, value) for name, value in named.items()}
    if not any(tensor.is_floating_point() for tensor in named.values()):
        raise ValueError("inputs must have a floating-point tensor, got none")
    return named


def listed_gradients(grads: Any, inputs: Mapping[str, Tensor]) -> list[Tensor | None]:
    """What a backward function returned, as a list in the order of the inputs.

    Only the gradients of floating-point inputs will be compared with anything.
    """
    names = list(inputs)
    if grads is None:
        raise ValueError(
            f"backward must return one gradient for each of {', '.join(names)}; got 1, which is "
            "None. Was its return forgotten?"
        )
    if isinstance(grads, Tensor) or (is_array(grads) and len(names) == 1):
        grads = [grads]
    if isinstance(grads, Mapping):
        unknown = [name for name in grads if name not in names]
        if unknown:
            raise ValueError(f"backward must return gradients of {', '.join(names)}; got {unknown}")
        grads = [grads.get(name) for name in names]
    if not isinstance(grads, Sequence):
        raise TypeError(
            f"backward must return a sequence or mapping of Tensors, got {type(grads).__name__}"
        )
    if len(grads) != len(names):
        raise ValueError(
            f"backward must return one gradient for each of {', '.join(names)}; got {len(grads)}"
        )
    grads = [torch.tensor(grad) if is_array(grad) else grad for grad in grads]
    for name, grad in zip(names, grads, strict=True):
        if not (grad is None or isinstance(grad, Tensor)):
            raise TypeError(
                f"backward's gradient of {name} must be a Tensor, got {type(grad).__name__}"
            )
        if grad is not None and grad.is_complex():
            raise TypeError(
                f"backward's gradient of {name} must be real, got {checks.name_of(grad.dtype)}"
            )
        if grad is not None and inputs[name].is_complex():
            raise TypeError(
                f"the input {name} must be real to be checked, got "
                f"{checks.name_of(inputs[name].dtype)}; return None for its gradient"
            )
    checked = [name for name in names if inputs[name].is_floating_point()]
    if all(grads[names.index(name)] is None for name in checked):
        raise ValueError(
            f"backward must return a gradient of {' or '.join(checked)} to be checked; got none"
        )
    return list(grads)


def pair_of_lists(grads: Any, layers: int) -> tuple[list[Any], list[Any]]:
    """The gradients of the weights and of the biases of a network, as a derivation returned them;
    one for each layer."""
    words = (
        f"backward must return the {layers} gradients of the weights and those of the biases, as "
        "two lists"
    )
    if grads is None:
        raise ValueError(f"{words}; got None. Was its return forgotten?")
    if not (isinstance(grads, Sequence) and len(grads) == 2):
        raise ValueError(f"{words}; got {type(grads).__name__}")
    of_weights, of_biases = list(grads[0]), list(grads[1] or ())
    if len(of_weights) != layers or len(of_biases) not in (0, layers):
        raise ValueError(f"{words}; got {len(of_weights)} and {len(of_biases)}")
    return of_weights, of_biases
