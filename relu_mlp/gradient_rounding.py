"""How far rounding takes the gradient of a function, found by changing what is computed.

Two right computations of a gradient differ by rounding. How much that may be follows
neither from the gradient, whose terms may cancel, nor from the function's value, of
which a part may be constant. So it is measured:

- by the product of the second derivative and a change of all inputs: so a rounding in
  them, or on the way from them to the loss, acts on the gradient;
- by backward passes in which the operands of every operation are changed at random: a
  sum that cancels shows how large its terms are.

Neither takes a function over a kink. Both are proportional to the function's scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._torch_private import TorchDispatchMode, schema_of_overload

Function = Callable[..., Tensor]

#: A number is changed by this much of its size: far more than its own rounding.
CHANGE = 2.0**-26

#: So often, with other signs; the largest effect counts.
TIMES = 4


def effects_of_inputs(
    function: Function, tensors: Mapping[str, Tensor], checked: Sequence[str]
) -> list[Tensor] | None:
    """What a change of every input by max(1, |input|), of either sign, makes of each gradient.

    Args:
        function: takes the inputs in their order and returns a tensor of one element.
        tensors: the inputs by name, those of floating point in float64.
        checked: the names of those that have a gradient.

    Returns:
        A tensor of absolute values for each that is checked; None if the function's
        gradient can't be differentiated.
    """
    generator = torch.Generator().manual_seed(0)
    effects = [torch.zeros_like(tensors[name]) for name in checked]
    try:
        with torch.enable_grad():
            leaves, loss = _recorded(function, tensors, checked)
            grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            for _ in range(TIMES):
                changes = [leaf.detach().abs().clamp(min=1) for leaf in leaves]
                product = sum(
                    (grad * change * _signs(change, generator)).sum()
                    for grad, change in zip(grads, changes, strict=True)
                    if grad is not None and grad.requires_grad
                )
                if not (isinstance(product, Tensor) and product.requires_grad):
                    break  # the function is linear
                # The second derivative is symmetric.
                found = torch.autograd.grad(product, leaves, retain_graph=True, allow_unused=True)
                effects = _larger(effects, found)
    except Exception:  # there are many ways to have no second derivative
        return None
    return effects


def effects_of_operations(
    function: Function,
    tensors: Mapping[str, Tensor],
    checked: Sequence[str],
    gradients: Sequence[Tensor],
) -> list[Tensor]:
    """What changes of the size of 1 of all operands in the backward pass make of each gradient.

    Args:
        function, tensors, checked: as for `effects_of_inputs`.
        gradients: those of an unchanged pass.

    Returns:
        A tensor of absolute values for each that is checked.
    """
    generator = torch.Generator().manual_seed(0)
    effects = [torch.zeros_like(gradient) for gradient in gradients]
    for _ in range(TIMES):
        with torch.enable_grad():
            leaves, loss = _recorded(function, tensors, checked)  # a graph may serve only once
        try:
            with Changing(generator):
                found = torch.autograd.grad(loss, leaves, allow_unused=True)
        except Exception:  # somebody's own backward pass may take no mode, or other numbers ill
            break
        changes = [
            None if grad is None else (dense(grad.detach()) - gradient) / CHANGE
            for grad, gradient in zip(found, gradients, strict=True)
        ]
        effects = _larger(effects, changes)
    return effects


#: Backward formulas whose second operand is compared with a number.
WITH_MASK = ("aten::threshold_backward", "aten::hardtanh_backward")


class Changing(TorchDispatchMode):
    """Changes the operands of every operation on floating point by `CHANGE` of their size.

    Not those of a view, of what writes to an operand, or of a comparison: a mask stays.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        schema, kwargs = schema_of_overload(func), kwargs or {}
        if schema is not None and not any(argument.alias_info for argument in schema.arguments):
            count = 1 if schema.name in WITH_MASK else len(args)
            changed = func(*map(self._changed, args[:count]), *args[count:], **kwargs)
            if not (isinstance(changed, Tensor) and not changed.is_floating_point()):
                return changed
        return func(*args, **kwargs)

    def _changed(self, operand: Any) -> Any:
        if not (isinstance(operand, Tensor) and operand.is_floating_point()):
            return operand
        return operand * (1 + CHANGE * _signs(operand, self.generator))


def _recorded(
    function: Function, tensors: Mapping[str, Tensor], checked: Sequence[str]
) -> tuple[list[Tensor], Tensor]:
    """The inputs that are checked, as leaves, and the function's value."""
    leaves = {
        name: tensor.clone().requires_grad_(name in checked) for name, tensor in tensors.items()
    }
    # Not the leaves themselves, which nobody may change in place.
    loss = function(*(leaf.clone() for leaf in leaves.values()))
    return [leaves[name] for name in checked], loss.sum()


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """1 or -1 at random, in the shape, the dtype and on the device of a tensor."""
    signs = torch.randint(0, 2, like.shape, generator=generator)
    return (2 * signs - 1).to(like.device, like.dtype)


def _larger(effects: Sequence[Tensor], found: Sequence[Tensor | None]) -> list[Tensor]:
    return [
        effect if tensor is None else torch.maximum(effect, dense(tensor.detach()).abs())
        for effect, tensor in zip(effects, found, strict=True)
    ]


def dense(tensor: Tensor) -> Tensor:
    """The gradient of an embedding may be sparse."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()
