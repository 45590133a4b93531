"""A call of a network that was found in a method: with an operator, or layer by layer.

Rewritten methods (see recognition.py) pass the functions that make up the network. The last one
comes first, because a nested call evaluates them in that order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..functional import call_operators, is_served, leaves_python
from ..interception import are_layers_replaced
from ..run import Run, find_run
from .conditions import DROPOUT_FUNCTION, does_nothing, is_relu

#: The only ReLU function with a second argument, `inplace`.
_relu_with_inplace = F.relu
_relu_methods = Tensor.relu, Tensor.relu_

#: Stands for an activation that is a function, and so carries no hooks.
_RELU = nn.ReLU()


class WithArguments:
    """A function with further arguments, which are evaluated when it is called."""

    def __init__(self, function: Any, others: Callable[[], tuple[Any, Any]]) -> None:
        self.function = function
        self.others = others

    def __call__(self, input: Any) -> Any:
        arguments, keywords = self.others()
        return self.function(input, *arguments, **keywords)


def call_relu(input: Any) -> Any:
    return input.relu()


def call_relu_(input: Any) -> Any:
    return input.relu_()


def cast(input: Any) -> Any:
    """Marks a cast to the dtype of the next weight. It is recognized and never called."""
    raise NotImplementedError


def call_fused(functions: tuple[Any, ...], input: Any) -> Tensor | None:
    """The network's output from one operator; None if the operators can't serve the call."""
    run = _run_of(functions, input)
    if run is None:
        return None
    return call_operators(input, run.weights, run.biases, run.activation, False)


def call_natively(functions: tuple[Any, ...], input: Any) -> Any:
    """The network's output from one call after another."""
    for function in reversed(functions):
        input = function(input)
    return input


def call(functions: tuple[Any, ...], input: Any) -> Any:
    """The network's output, from one operator if that can serve the call."""
    output = call_fused(functions, input)
    return call_natively(functions, input) if output is None else output


def _run_of(functions: tuple[Any, ...], x: Any) -> Run | None:
    """The network that these functions make up, or None if the operators can't serve it
    in its present state and for this x."""
    if leaves_python() or not is_served(x) or are_layers_replaced():
        return None
    chain: list[nn.Module] = []
    has_cast = False
    for function in reversed(functions):
        if type(function) is nn.Linear or type(function) is nn.ReLU:
            chain.append(function)
        elif function is call_relu or function is call_relu_:
            if _relu_methods != (Tensor.relu, Tensor.relu_):
                return None
            chain.append(_RELU)
        elif is_relu(function):
            chain.append(_RELU)
        elif type(function) is WithArguments:
            arguments, keywords = function.others()
            if function.function is _relu_with_inplace:
                _check_relu_arguments(*arguments, **keywords)
                chain.append(_RELU)
            elif function.function is not DROPOUT_FUNCTION or _drops(*arguments, **keywords):
                return None
        elif function is cast:
            has_cast = True
        elif not isinstance(function, nn.Module) or not does_nothing(function):
            return None
    run = find_run(chain)
    if run is None or len(run.children) < len(chain):
        return None
    if has_cast and not _casts_change_nothing(x, run):
        return None
    functional.check_empty_biases(run.weights, run.biases)
    return run


def _drops(p: Any = 0.5, training: Any = True, inplace: Any = False) -> bool:
    """Whether `F.dropout` with these arguments may return something else than its input."""
    return not 0 <= p <= 1 or (training and p != 0)


def _check_relu_arguments(inplace: Any = False) -> None:
    """Raises a TypeError for the arguments for which `F.relu` raises one."""


def _casts_change_nothing(x: Tensor, run: Run) -> bool:
    """Whether casting a hidden tensor to the dtype of the next weight makes no difference.

    It makes none if the tensor has that dtype. Under autocast the Linear casts the tensor
    back. Then no value has changed if the dtype in between is float32 or that of autocast.
    """
    dtypes = {weight.dtype for weight in run.weights}
    device = x.device.type
    is_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if is_autocast and torch.float64 not in {x.dtype, *dtypes}:
        return dtypes <= {torch.float32, torch.get_autocast_dtype(device)}
    return dtypes == {x.dtype}
