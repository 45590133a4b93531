"""The torch.autograd.Function: what is saved, and who computes the backward pass.

At small sizes the time goes into this file and not into arithmetic. So what
depends only on which arguments need a gradient is worked out once, in a `Plan`
that is cached, and a call follows it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, reference
from .ops import Implementation, below_autograd

# To look it up in `torch` on every call takes a while.
_is_grad_enabled = torch.is_grad_enabled

Pick = Callable[[Sequence[Any]], tuple[Any, ...]]


class Plan(NamedTuple):
    """What to save and what to return, for one pattern of needed gradients."""

    #: The needs as the operator takes them: of x, every weight, every bias.
    needs: str
    save_hidden: bool
    #: From (x, y, *weights, *hidden), what the backward operator wants.
    kept: Pick
    #: From (None, *gradients), what the Function returns.
    returned: Pick


@lru_cache(maxsize=1024)
def plan_for(layers: int, needs_input_grad: tuple[bool, ...], output_activation: str) -> Plan:
    """The plan for the needs of (call, x, *weights) or (call, x, *weights, *biases)."""
    needs = "".join("01"[need] for need in needs_input_grad[1:])
    returned = [sum(needs_input_grad[: n + 1]) * need for n, need in enumerate(needs_input_grad)]
    if len(needs) == 1 + layers:
        needs += "0" * layers
    kept = reference.is_kept(output_activation, needs)
    return Plan(
        needs=needs,
        save_hidden=any(needs_input_grad),
        kept=_pick([n for n, is_kept in enumerate(kept) if is_kept]),
        returned=_pick(returned),
    )


def _pick(positions: list[int]) -> Pick:
    """An `itemgetter` that returns a tuple for any number of positions."""
    if len(positions) >= 2:
        return itemgetter(*positions)
    return lambda items: tuple([items[position] for position in positions])


#: The arguments of `MLP` that are not tensors: what computes, the output
#: activation, whether to recompute, and the number of layers.
Call = tuple[Implementation, str, bool, int]


class MLP(torch.autograd.Function):
    """One autograd node for the whole network.

    It returns y and the hidden activations. The latter are outputs for the
    sake of the second derivative: a saved output keeps its place in the graph,
    so a backward pass that is itself differentiated sends gradients on to
    a_1, ..., a_{L-1}, and they arrive here as `grad_hidden`.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """`parameters` are the weights, then nothing or one bias for each.

        A bias that is missing is a tensor without elements.
        """
        implementation, output_activation, recompute, layers = call
        weights, biases = parameters[:layers], parameters[layers:]
        plan = plan_for(layers, ctx.needs_input_grad, output_activation)
        save_hidden = plan.save_hidden and not recompute
        with below_autograd():
            y, hidden = implementation.forward(x, weights, biases, output_activation, save_hidden)
        if not plan.save_hidden:
            return (y,)
        if recompute:
            ctx.save_for_backward(x, *parameters)
        else:
            # Exactly what the native path saves, so that a change in place
            # raises where it does natively.
            ctx.save_for_backward(*plan.kept((x, y, *weights, *hidden)))
        ctx.set_materialize_grads(False)
        ctx.remembered = call, plan, y.shape
        return (y, *hidden)

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, *grad_hidden: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        call, plan, y_shape = ctx.remembered
        implementation, output_activation, recompute, layers = call
        saved = ctx.saved_tensors
        reached = [grad for grad in grad_hidden if grad is not None]
        if reached or grad_output is None or _is_grad_enabled():
            # A second derivative is or was asked for: the reference is made of
            # differentiable operations.
            if grad_output is None:
                if not reached:
                    return (None,) * len(ctx.needs_input_grad)
                grad_output = reached[0].new_zeros(y_shape)
            if recompute:
                saved = plan.kept(_forward_again(call, *saved))
            grads = reference.backward(
                grad_output, saved, output_activation, plan.needs, grad_hidden
            )
        elif recompute:
            x, weights, biases = saved[0], saved[1 : 1 + layers], saved[1 + layers :]
            with below_autograd():
                grads = implementation.recompute_backward(
                    grad_output, x, weights, biases, output_activation, plan.needs
                )
        else:
            with below_autograd():
                grads = implementation.backward(grad_output, saved, output_activation, plan.needs)
        return plan.returned((None, *grads))


#: `MLP.apply` without the Python part of `torch.autograd.Function.apply`, which
#: serves functorch alone and takes as long as a small network.
apply = super(torch.autograd.Function, MLP).apply


def _forward_again(call: Call, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """(x, y, *weights, *hidden), with a graph of their own if gradients are enabled."""
    implementation, output_activation, _, layers = call
    weights, biases = parameters[:layers], parameters[layers:]
    if _is_grad_enabled():
        again: Call = (implementation, output_activation, False, layers)
        y, *hidden = apply(again, x, *parameters)
    else:
        with below_autograd():
            y, hidden = implementation.forward(x, weights, biases, output_activation, True)
    return (x, y, *weights, *hidden)


def _relu_mlp_autograd(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_activation: str = "none",
) -> Tensor:
    """The derivative of the operator for people, `torch.ops.relu_mlp.relu_mlp`."""
    if weights and ops.is_differentiated(x, weights, biases):
        call: Call = (ops.extension, output_activation, False, len(weights))
        # One that stands for a missing bias has no gradient.
        present = [
            bias if bias.numel() or bias.shape == weight.shape[:1] else bias.detach()
            for weight, bias in itertools.zip_longest(weights, biases, fillvalue=weights[0])
        ]
        return apply(call, x, *weights, *present[: len(biases)])[0]
    with below_autograd():
        return torch.ops.relu_mlp.relu_mlp.default(x, weights, biases, output_activation)


ops._library.impl("relu_mlp", _relu_mlp_autograd, "Autograd")
