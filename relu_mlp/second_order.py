"""The derivatives of the backward pass: the second derivative of the network, by hand.

`reference.backward` takes g = d loss / d y and what was saved, and returns gradients:

    delta_L = g * phi'(z_L)            dW_l = delta_l^T a_{l-1}         db_l = sum of delta_l
    delta_{l-1} = delta_l W_l where a_{l-1} > 0 or is NaN, else 0      dx = delta_1 W_1

The mask is locally constant, so this is a chain of products like the forward pass. It has two
derivatives: the vector-Jacobian product `backward_vjp`, for reverse over reverse, and the
Jacobian-vector product `backward_jvp`, for forward over reverse.

Let x', W_l', b_l' be the gradients that reach dx, dW_l, db_l. The gradient that they send to
delta_l is z_l' of the forward-mode derivative (`reference.jvp`) with x', W_l', b_l' as tangents,
because the transpose of the backward pass runs forwards. With its a_l', the gradients are

    for g      phi'(z_L) * z_L'                     (which is y')
    for W_l    delta_l^T a_{l-1}'
    for a_l    delta_{l+1} W_{l+1}'                 (x is a_0)
    for y      g * z_L' * d phi'/d y                where phi' is not piecewise constant

ReLU masks send explicit zeros (not None) to the a_l or y that they are computed from, as
PyTorch does, so the same inputs are reachable in a second derivative.

Everything consists of differentiable operations, so third derivatives exist.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ._torch_private import version_of
from .activations import ACTIVATION_BACKWARDS, CURVATURES, select
from .reference import (
    as_matrix,
    is_kept,
    lowest_layer,
    propagate_tangents,
    unpack,
)


def symbolic_zeros_like(tensor: Tensor) -> Tensor:
    """Zeros with the shape of a tensor, which `is_symbolic_zero` recognizes.

    They have their own memory, because autograd may add to them in place.
    """
    zeros = torch.zeros_like(tensor)
    zeros.is_symbolic_zero = True  # type: ignore[attr-defined]
    return zeros


def is_symbolic_zero(tensor: Tensor) -> bool:
    """Whether a tensor is known to come from `symbolic_zeros_like` and to be unchanged.

    If autograd adds to it in place, or a hook changes it, its version increases.
    """
    return (
        hasattr(tensor, "is_symbolic_zero")
        and not tensor.is_inference()
        and version_of(tensor) == 0
    )


class Reach(Enum):
    """What `backward_vjp` returns as a gradient."""

    NOTHING = 0  #: None: nothing reaches the tensor
    ZEROS = 1  #: symbolic zeros, because only a mask reads it
    NUMBERS = 2


@functools.lru_cache(maxsize=1024)
def reach_of(output_activation: str, needs: str, given: str) -> list[Reach]:
    """What `backward_vjp` returns at grad_output and at each of `saved`.

    Args:
        output_activation, needs: as in `backward_vjp`.
        given: ``"1"`` for each cotangent that is not None, and ``"0"`` for the others.
    """
    layers, lowest = len(needs) // 2, lowest_layer(needs)
    x, weights, biases = by_need([flag == "1" for flag in given], needs)
    has_tangent = [bool(x)]
    for pair in zip(weights, biases, strict=True):
        has_tangent.append(has_tangent[-1] or any(pair))
    of_grad_output = of_y = Reach.NUMBERS if has_tangent[layers] else Reach.NOTHING
    if has_tangent[layers] and output_activation not in CURVATURES:
        of_y = Reach.ZEROS
    of_weights = [Reach.NUMBERS if reached else Reach.NOTHING for reached in has_tangent[:-1]]
    of_inputs = [
        Reach.NUMBERS
        if weights[layer]
        else Reach.ZEROS
        if layer > lowest and has_tangent[layer]
        else Reach.NOTHING
        for layer in range(layers)
    ]
    of_kept = [of_inputs[0], of_y, *of_weights, *of_inputs[1:]]
    return [of_grad_output, *itertools.compress(of_kept, is_kept(output_activation, needs))]


def backward_vjp(
    grad_output: Tensor,
    saved: Sequence[Tensor],
    output_activation: str,
    needs: str,
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The vector-Jacobian product of `reference.backward`.

    Args:
        grad_output, saved, output_activation, needs: the arguments of
            `reference.backward`.
        cotangents: a gradient for each of its results; None is 0.

    Returns:
        The gradients at grad_output and at each of `saved`; None is 0.
    """
    layers, lowest = len(needs) // 2, lowest_layer(needs)
    x_tangent, weight_tangents, bias_tangents = by_need(cotangents, needs)
    y, weights, inputs = unpack(saved, output_activation, needs)
    if x_tangent is not None:
        x_tangent = as_matrix(x_tangent)
    deltas = propagate_deltas(grad_output, y, weights, inputs, output_activation, needs)
    tangents = propagate_tangents(
        inputs, weights, x_tangent, weight_tangents, bias_tangents, lowest, deltas[-1].shape[0]
    )
    change = tangents[-1]
    of_grad_output = of_y = None
    if change is not None:
        change = change.reshape(grad_output.shape)
        of_grad_output = ACTIVATION_BACKWARDS[output_activation](change, y)
        if output_activation in CURVATURES:
            of_y = grad_output * change * CURVATURES[output_activation](y)
        elif y is not None:
            of_y = symbolic_zeros_like(y)
    of_weights = [
        None if delta is None or tangent is None else delta.T @ tangent
        for delta, tangent in zip(deltas, tangents[:-1], strict=True)
    ]
    of_inputs: list[Tensor | None] = []
    for layer, (delta, weight_tangent) in enumerate(zip(deltas, weight_tangents, strict=True)):
        if delta is not None and weight_tangent is not None:
            of_inputs.append((delta @ weight_tangent).reshape(inputs[layer].shape))
        elif layer > lowest and tangents[layer] is not None:
            of_inputs.append(symbolic_zeros_like(inputs[layer]))
        else:
            of_inputs.append(None)
    of_kept = [of_inputs[0], of_y, *of_weights, *of_inputs[1:]]
    assert len(of_kept) == 1 + 2 * layers
    return [of_grad_output, *itertools.compress(of_kept, is_kept(output_activation, needs))]


def backward_jvp(
    grad_output: Tensor,
    saved: Sequence[Tensor],
    output_activation: str,
    needs: str,
    grad_output_tangent: Tensor | None,
    saved_tangents: Sequence[Tensor | None],
) -> list[Tensor]:
    """The Jacobian-vector product of `reference.backward`.

    With a prime for a change,

        delta_L'     = g' * phi'(z_L) + g * y' * d phi'/d y
        dW_l'        = delta_l'^T a_{l-1} + delta_l^T a_{l-1}'      db_l' = sum of delta_l'
        delta_{l-1}' = delta_l' W_l + delta_l W_l' where a_{l-1} > 0 or is NaN, else 0

    Args:
        grad_output, saved, output_activation, needs: the arguments of
            `reference.backward`.
        grad_output_tangent, saved_tangents: g', and the change of each of `saved`;
            None is 0.

    Returns:
        The change of each gradient.
    """
    lowest = lowest_layer(needs)
    y, weights, inputs = unpack(saved, output_activation, needs)
    y_tangent, weight_tangents, input_tangents = unpack(saved_tangents, output_activation, needs)
    deltas = propagate_deltas(grad_output, y, weights, inputs, output_activation, needs)
    change = grad_output.new_zeros(grad_output.shape)
    if grad_output_tangent is not None:
        change = ACTIVATION_BACKWARDS[output_activation](grad_output_tangent, y)
    if y_tangent is not None and output_activation in CURVATURES:
        change = change + grad_output * y_tangent * CURVATURES[output_activation](y)
    delta_tangent = as_matrix(change)
    of_weights: list[Tensor] = []
    of_biases: list[Tensor] = []
    for layer in reversed(range(lowest, len(weights))):
        delta, tangent = deltas[layer], input_tangents[layer]
        if needs[1 + layer] == "1":
            product = delta_tangent.T @ as_matrix(inputs[layer])
            if tangent is not None:
                product = product + delta.T @ as_matrix(tangent)
            of_weights.append(product)
        if needs[1 + len(weights) + layer] == "1":
            of_biases.append(delta_tangent.sum(0))
        if layer > lowest or needs[0] == "1":
            delta_tangent = delta_tangent @ weights[layer]
            if weight_tangents[layer] is not None:
                delta_tangent = delta_tangent + delta @ weight_tangents[layer]
            if layer > 0:
                delta_tangent = select(delta_tangent, inputs[layer])
    of_x = (
        [delta_tangent.reshape(*grad_output.shape[:-1], delta_tangent.shape[1])]
        if needs[0] == "1"
        else []
    )
    return [*of_x, *reversed(of_weights), *reversed(of_biases)]


def propagate_deltas(
    grad_output: Tensor,
    y: Tensor,
    weights: Sequence[Any],
    inputs: Sequence[Any],
    output_activation: str,
    needs: str,
) -> list[Any]:
    """delta_1, ..., delta_L as matrices; None below the lowest layer that has a gradient."""
    layers, lowest = len(weights), lowest_layer(needs)
    deltas = [as_matrix(ACTIVATION_BACKWARDS[output_activation](grad_output, y))]
    for layer in reversed(range(lowest + 1, layers)):
        deltas.append(select(deltas[-1] @ weights[layer], inputs[layer]))
    return [None] * lowest + deltas[::-1]


def by_need(items: Iterable[Any], needs: str) -> tuple[Any, list[Any], list[Any]]:
    """The items for x, every weight and every bias; None where no gradient was wanted."""
    remaining = iter(items)
    x, *rest = [next(remaining) if need == "1" else None for need in needs]
    return x, rest[: len(rest) // 2], rest[len(rest) // 2 :]
