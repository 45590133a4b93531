"""The tensors that an operator gets: the plain ones, the missing ones, the differentiated ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import Parameter

from .._torch_private import FORWARD_AD, LEVEL, may_be_fake, peek_interpreter_stack
from .library import outside_modes

#: The types of ordinary tensors; a subclass may mean anything.
PLAIN = frozenset({Tensor, Parameter})


#: Stands for a missing tensor in an operator's arguments. It is an ordinary tensor without
#: elements, even if the first import happens under a transform or a mode, which would make a tensor
#: of another kind.
NO_TENSOR = outside_modes(lambda: torch.empty(0, dtype=torch.float32, device="cpu"))


def stand_ins(biases: Sequence[Tensor]) -> Sequence[Tensor]:
    """The biases as an operator takes them in the active modes.

    A FakeTensorMode rejects the real `NO_TENSOR`, and gets a fake one.
    """
    if not may_be_fake():
        return biases
    return [torch.empty(0) if bias is NO_TENSOR else bias for bias in biases]


def _tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors_in(argument)


def carries_tangent(*arguments: Any) -> bool:
    """Whether a tensor among the arguments carries a forward-mode tangent."""
    # Level 0 is the only one. A graph that is being compiled enters it without setting
    # `forward_ad`'s level, but its tensors are wrapped or of another type.
    if FORWARD_AD[LEVEL] < 0 and peek_interpreter_stack() is None and _are_plain(arguments):
        return False
    return any(
        forward_ad.unpack_dual(tensor, level=0).tangent is not None
        for tensor in _tensors_in(arguments)
    )


def _are_plain(arguments: Iterable[Any]) -> bool:
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            if not PLAIN.issuperset(map(type, argument)):
                return False
        elif isinstance(argument, Tensor) and type(argument) not in PLAIN:
            return False
    return True


def is_differentiated(*arguments: Any) -> bool:
    """Whether a tensor among the arguments needs a gradient or carries a tangent."""
    return (
        torch.is_grad_enabled() and any(t.requires_grad for t in _tensors_in(arguments))
    ) or carries_tangent(*arguments)
