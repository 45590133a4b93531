"""Which children of a module may run as one network: `find_run` and `network_of`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import Linear, ReLU

from . import functional, interception
from ._torch_private import (
    BACKWARD_HOOKS,
    BACKWARD_PRE_HOOKS,
    CALL_IMPL,
    COMPILED_CALL_IMPL,
    FORWARD_HOOKS,
    FORWARD_PRE_HOOKS,
    PARAMETERS,
    children_of,
)
from .activations import DEFAULTS, OUTPUT_ACTIVATIONS, OutputActivation
from .functional import is_plain
from .ops import NO_TENSOR


class Run(NamedTuple):
    """Children that are one network: Linear, ReLU, ..., Linear, activation."""

    children: tuple[nn.Module, ...]
    weights: list[Tensor]
    biases: list[Tensor]  #: one for each weight, or nothing; NO_TENSOR where one is missing
    activation: str


def is_patched(state: dict[str, Any]) -> Any:
    """Whether a call of a module may do more than its class defines, as a truth value.

    `state` is the module's `__dict__`. Python looks up attributes there before it asks the
    class or the parameters.
    """
    try:
        return (
            state[FORWARD_HOOKS]
            or state[FORWARD_PRE_HOOKS]
            or state[BACKWARD_HOOKS]
            or state[BACKWARD_PRE_HOOKS]
            or "forward" in state
            or CALL_IMPL in state
            or COMPILED_CALL_IMPL in state
            or "weight" in state
            or "bias" in state
        )
    except KeyError:  # this PyTorch keeps hooks elsewhere, so there may be some
        return True


def has_defaults(child: nn.Module) -> bool:
    """Whether a module has its class's default settings: nn.Softplus(beta=2) has not."""
    defaults = DEFAULTS.get(type(child), {})
    return all(getattr(child, name) == value for name, value in defaults.items())


def _activation_of(child: nn.Module) -> OutputActivation | None:
    """The activation that a module computes, if it may follow the last Linear."""
    kind = type(child)
    activation = OUTPUT_ACTIVATIONS.get(kind)
    if activation is None or kind is ReLU:
        return activation
    if interception.is_output_activation_replaced(kind):
        return None
    return activation if has_defaults(child) else None


def find_run(
    children: Iterable[nn.Module], is_known: Callable[[object], bool] = is_plain
) -> Run | None:
    """The longest run of unchanged children that starts with the first child, or None.

    `is_known` says which parameters the caller can serve.
    """
    found: list[nn.Module] = []
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    activation = "none"
    after_linear = False
    for child in children:
        kind = type(child)
        follows = _activation_of(child) if after_linear else None
        if follows is None and (after_linear or kind is not Linear):
            break
        # torch.compile guards on what is read and not on missing keys, so `forward` is read.
        if is_patched(child.__dict__) or child.forward is None:
            break
        if follows is not None:
            activation = follows
        else:
            parameters = child.__dict__.get(PARAMETERS, {})
            if "weight" not in parameters or "bias" not in parameters:
                break  # pruned
            # Not with `get`: a custom dict may fetch a parameter from elsewhere on access.
            weight, bias = parameters["weight"], parameters["bias"]
            if not is_known(weight) or not (bias is None or is_known(bias)):
                break  # quantized or distributed, which the operators can't serve
            weights.append(weight)
            biases.append(NO_TENSOR if bias is None else bias)
            activation = "none"
        found.append(child)
        if after_linear and kind is not ReLU:
            break  # nothing can follow in the same run
        after_linear = not after_linear
    if not weights:
        return None
    if all(bias is NO_TENSOR for bias in biases):
        biases = []
    return Run(tuple(found), weights, biases, activation)


def network_of(sequential: nn.Sequential) -> tuple[list[Tensor], list[Tensor], str] | None:
    """(weights, biases, activation) of a module whose children are all one run, or None.

    Nothing is remembered from one call to the next, because children can be changed in many ways
    that a module does not notice. Where the native node is built, csrc/autograd/children.cpp reads
    the usual networks instead.
    """
    children = children_of(sequential)
    run = find_run(children.values())
    if run is None or len(run.children) < len(children):
        return None
    functional.check_empty_biases(run.weights, run.biases)
    return run.weights, run.biases, run.activation
