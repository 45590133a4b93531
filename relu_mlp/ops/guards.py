"""Guards of the operators without a derivative, and a bypass of the others' Autograd kernels.

An operator without a derivative must raise instead of silently dropping a gradient or a tangent.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from .. import reference
from .._torch_private import (
    FORWARD_AD,
    HAS_BELOW_AUTOGRAD,
    LEVEL,
    below_autograd,
    call_of,
    replace_call,
)
from .arguments import PLAIN, is_differentiated
from .backend import original_call
from .library import DIFFERENTIABLE, OPERATORS, kernels_of
from .native_node import node

_library = kernels_of(__name__)


def _guard(name: str) -> Callable[..., Any]:
    """The Autograd kernel of an operator without a derivative."""
    operator = getattr(torch.ops.relu_mlp, name).default
    if not HAS_BELOW_AUTOGRAD:
        operator = getattr(reference, name)

    def guarded(*arguments: Any) -> Any:
        if is_differentiated(*arguments):
            raise RuntimeError(
                f"relu_mlp::{name} has no derivative, and an argument needs a gradient or "
                "carries a tangent. Call torch.ops.relu_mlp.relu_mlp or relu_mlp.relu_mlp, "
                "which are differentiable, or detach the arguments."
            )
        with below_autograd():
            return operator(*arguments)

    return guarded


for _name in OPERATORS:
    if _name not in DIFFERENTIABLE:
        _library.impl(_name, _guard(_name), "Autograd")


# -- A bypass of the Autograd kernels --------------------------------------------

_is_grad_enabled = torch.is_grad_enabled
_nothing = nullcontext()


def _bypass_autograd_when_idle(name: str) -> None:
    """Lets calls from Python bypass the Autograd kernel when it would have nothing to do.

    A compiled graph calls its operators in that state. The Autograd kernel is written in Python,
    and calling it takes as long as a small network.
    """
    operator = getattr(torch.ops.relu_mlp, name).default
    call = original_call(name)
    if call_of(operator) is not call:  # an earlier import has done it
        return

    def below_autograd_if_idle(*arguments: Any, **named: Any) -> Any:
        is_idle = (
            not _is_grad_enabled()
            and FORWARD_AD[LEVEL] < 0
            and arguments
            and type(arguments[0]) in PLAIN  # another type where a graph is recorded
        )
        # One line serves both cases, because `torch.jit.trace` writes line numbers into the graph
        # and compares the graph with that of a second trace, made without gradients.
        with below_autograd() if is_idle else _nothing:
            return call(*arguments, **named)

    call_operator: Callable[..., Any] = below_autograd_if_idle
    if node is not None:  # it computes what is plain, without this function and the dispatcher
        call_operator = node.operator(name, below_autograd_if_idle)
    replace_call(operator, call_operator)


if HAS_BELOW_AUTOGRAD:
    for _name in DIFFERENTIABLE:
        _bypass_autograd_when_idle(_name)
