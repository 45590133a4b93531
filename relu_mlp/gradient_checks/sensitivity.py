"""How far rounding can move a gradient, measured by perturbing the computation.

Two correct computations of a gradient differ by rounding. Neither the gradient tells how much,
because its terms may cancel, nor the function's value, because a part of it may be constant.
So the sensitivity is measured in two ways:

- The product of the second derivative with a change of all inputs. A rounding of an input, or
  on the way from the inputs to the loss, acts on the gradient like that.
- Backward passes that perturb the operands of every operation at random. If a sum cancels,
  this shows how large its terms are.

Neither moves a function across a kink. Both are proportional to the function's scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch_private import TorchDispatchMode, schema_of_overload

Function = Callable[..., Tensor]

#: The relative perturbation of a number: far more than its rounding.
PERTURBATION = 2.0**-26

#: How many times, with different random signs. The largest effect counts.
REPEATS = 4


def input_sensitivity(
    function: Function, tensors: Mapping[str, Tensor], checked: Sequence[str]
) -> list[Tensor] | None:
    """How far each gradient moves when every input changes by +-max(1, |input|), to first order.

    Args:
        function: takes the inputs in their order and returns a tensor of one element.
        tensors: the inputs by name, floating-point inputs in float64.
        checked: the names of the inputs that have a gradient.

    Returns:
        A tensor of absolute values for each checked input; None if the function's gradient
        can't be differentiated.
    """
    generator = torch.Generator().manual_seed(0)
    effects = [torch.zeros_like(tensors[name]) for name in checked]
    try:
        with torch.enable_grad():
            leaves, loss = leaves_and_loss(function, tensors, checked)
            grads = torch.autograd.grad(loss.sum(), leaves, create_graph=True, allow_unused=True)
            for _ in range(REPEATS):
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
    except Exception:  # a second derivative can fail in many ways
        return None
    return effects


def operand_sensitivity(
    function: Function,
    tensors: Mapping[str, Tensor],
    checked: Sequence[str],
    gradients: Sequence[Tensor],
) -> list[Tensor]:
    """How far each gradient moves when all operands of the backward pass change by +-100 %.

    The perturbations are small, and their effects are scaled.

    Args:
        function, tensors, checked: as for `input_sensitivity`.
        gradients: those of an unperturbed pass.

    Returns:
        A tensor of absolute values for each checked input.
    """
    generator = torch.Generator().manual_seed(0)
    effects = [torch.zeros_like(gradient) for gradient in gradients]
    for _ in range(REPEATS):
        with torch.enable_grad():
            leaves, loss = leaves_and_loss(function, tensors, checked)  # one graph for each pass
            total = loss.sum()
        try:
            with PerturbOperands(generator):
                found = torch.autograd.grad(total, leaves, allow_unused=True)
        except Exception:  # a custom backward pass may support no mode, or reject the numbers
            break
        changes = [
            None if grad is None else (dense(grad.detach()) - gradient) / PERTURBATION
            for grad, gradient in zip(found, gradients, strict=True)
        ]
        effects = _larger(effects, changes)
    return effects


#: Backward operations that compare their second operand with a number, which makes a mask.
WITH_MASK = ("aten::threshold_backward", "aten::hardtanh_backward")


class PerturbOperands(TorchDispatchMode):
    """Perturbs the floating-point operands of every operation by +-`PERTURBATION` of their size.

    Views, operations that write to an operand, and comparisons get their operands unchanged,
    so that masks stay the same.
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
            changed = func(*map(self._perturbed, args[:count]), *args[count:], **kwargs)
            if not (isinstance(changed, Tensor) and not changed.is_floating_point()):
                return changed
        return func(*args, **kwargs)

    def _perturbed(self, operand: Any) -> Any:
        if not (isinstance(operand, Tensor) and operand.is_floating_point()):
            return operand
        return operand * (1 + PERTURBATION * _signs(operand, self.generator))


def leaves_and_loss(
    function: Function, tensors: Mapping[str, Tensor], checked: Sequence[str]
) -> tuple[list[Tensor], Tensor]:
    """The checked inputs as leaves of a graph, and what the function returns for them."""
    leaves = {
        name: tensor.clone().requires_grad_(name in checked) for name, tensor in tensors.items()
    }
    # The function gets clones, because nobody may change a leaf in place.
    loss = function(*(leaf.clone() for leaf in leaves.values()))
    return [leaves[name] for name in checked], loss


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """1 or -1 at random, with the shape, dtype and device of a tensor."""
    signs = torch.randint(0, 2, like.shape, generator=generator)
    return (2 * signs - 1).to(like.device, like.dtype)


def _larger(effects: Sequence[Tensor], found: Sequence[Tensor | None]) -> list[Tensor]:
    return [
        effect if tensor is None else torch.maximum(effect, dense(tensor.detach()).abs())
        for effect, tensor in zip(effects, found, strict=True)
    ]


def dense(tensor: Tensor) -> Tensor:
    """A gradient as a strided tensor: that of an embedding may be sparse."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()
