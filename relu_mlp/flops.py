"""The operators' floating-point operations, for `torch.utils.flop_counter.FlopCounterMode`.

As in PyTorch, the product of an (m, k) and a (k, n) counts 2 m n k, and biases and
activations count nothing. A formula takes the operator's arguments and its result
(`out_shape`), with a shape in the place of every tensor. The reference needs no formulas:
PyTorch counts the operations that it calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import compress

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import ops
from .reference import is_kept, unpack
from .second_order import Reach, by_need, reach_of

Shape = Sequence[int]

_operators = torch.ops.relu_mlp

for _name in ops.OPERATORS:
    flop_registry.pop(getattr(_operators, _name), None)  # from an earlier import


def _products(x: Shape, weights: Iterable[Shape]) -> int:
    """One product with the rows of x for each of the weights, or for its gradient."""
    return 2 * math.prod(x[:-1]) * sum(map(math.prod, weights))


@register_flop_formula([_operators.relu_mlp, _operators.forward])
def forward(x: Shape, weights: Sequence[Shape], *_: object, out_shape: object) -> int:
    """Counts a_{l-1} W_l^T for every layer."""
    return _products(x, weights)


@register_flop_formula(_operators.backward)
def backward(
    grad_output: Shape,
    saved: Sequence[Shape],
    output_activation: str,
    needs: str,
    out_shape: Sequence[Shape],
) -> int:
    """Counts delta_l^T a_{l-1} for every wanted gradient, and delta_l W_l for every saved W_l."""
    layers = len(needs) // 2
    kept = is_kept(output_activation, needs)
    first, first_wanted = sum(kept[:2]), int(needs[0])  # after x and y, and after the gradient of x
    weights = saved[first : first + sum(kept[2 : 2 + layers])]
    wanted = out_shape[first_wanted : first_wanted + needs[1 : 1 + layers].count("1")]
    return _products(grad_output, [*weights, *wanted])


@register_flop_formula(_operators.backward_vjp)
def backward_vjp(
    grad_output: Shape,
    saved: Sequence[Shape],
    output_activation: str,
    needs: str,
    cotangents: Sequence[Shape],
    given: str,
    wanted: str,
    out_shape: object,
) -> int:
    """Counts delta_l W_l, a_{l-1}' W_l^T, a_{l-1} W_l'^T, delta_l^T a_{l-1}' and delta_l W_l' for
    the layers where something that is wanted depends on it."""
    _, weights, _ = unpack(saved, output_activation, needs)
    remaining = iter(cotangents)
    _, changes, _ = by_need([next(remaining) if flag == "1" else None for flag in given], needs)
    reached = [reach is Reach.NUMBERS for reach in reach_of(output_activation, needs, given)]
    _, has_tangent, _ = unpack(reached[1:], output_activation, needs)
    computed = [
        is_reached and flag == "1" for is_reached, flag in zip(reached, wanted, strict=True)
    ]
    of_y, of_weights, of_inputs = unpack(computed[1:], output_activation, needs)
    layers = range(len(weights))
    with_delta = [layer for layer in layers if of_weights[layer] or of_inputs[layer]]
    lowest_delta = min(with_delta, default=len(weights))
    is_whole = computed[0] or of_y  # the tangents go up to z_L
    highest = len(weights) if is_whole else max((n for n in layers if of_weights[n]), default=0)
    products: list[Shape] = []
    for layer in layers:
        weight, change = weights[layer], changes[layer]
        products += [weight] * (layer > lowest_delta)
        products += [weight] * bool(has_tangent[layer] and layer < highest)
        products += [change] * (change is not None and layer < highest)
        products += [weight] * bool(of_weights[layer])
        products += [change] * bool(of_inputs[layer])
    return _products(grad_output, products)


@register_flop_formula(_operators.recompute_backward)
def recompute_backward(
    grad_output: Shape,
    x: Shape,
    weights: Sequence[Shape],
    biases: Sequence[Shape],
    output_activation: str,
    needs: str,
    out_shape: object,
) -> int:
    """Counts the hidden layers, the last layer if y is needed, and the backward pass."""
    again = weights if output_activation != "none" else weights[:-1]
    propagated = compress(weights, is_kept(output_activation, needs)[2:])
    wanted = compress(weights, map(int, needs[1:]))
    return _products(x, [*again, *propagated, *wanted])


@register_flop_formula(_operators.loss_and_grads)
def loss_and_grads(
    x: Shape, target: Shape, weights: Sequence[Shape], *_: object, out_shape: object
) -> int:
    """Counts the forward pass, and the backward pass for all parameters."""
    return _products(x, [*weights, *weights, *weights[1:]])


for _name in ops.OPERATORS:
    flop_registry[getattr(_operators, f"_{_name}_in_cpp")] = flop_registry[
        getattr(_operators, _name)
    ]
