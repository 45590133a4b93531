"""The shortest time that a step can take on this machine, at its present speed.

That is max(operations / rate, compulsory bytes / bandwidth). The rate is that of a
1536 x 1536 x 1536 `torch.mm` of the same dtype. The bandwidth is that of a copy too large for
the caches. Both are timed by turns with the candidates, because the speed of a shared machine
drifts.

Operations are those of the dense products: 2 * rows * in * out for each of forward, gradient of
the weight and gradient of the input (for the first layer only if the input needs one).

Compulsory bytes are those that every order of computation has to move, if no cache keeps data from
one pass over the rows to the next:

    inference        x, the weights and biases; y written
    training         x for the forward pass and again for the first weight's gradient; hidden
                     activations written once and read once; y written; grad_output;
                     weights and biases twice (the first weight once, unless the input needs a
                     gradient, and the biases once); their gradients, and the input's, written
    loss_and_grads   one pass is enough: x, target, the weights and biases; gradients written

A step that fits in the cache may be faster than the second term.
"""

from __future__ import annotations

import itertools

import torch

from .candidates import Shape, Step

MM, COPY = "1536^3 mm", "copy of 128 MiB"
_SIDE = 1536
_COPIED = 2**25  #: float32 elements


def probes(dtype: torch.dtype) -> dict[str, Step]:
    """The two probes, as candidates for `turns.time_by_turns`."""
    a, b = (torch.randn(_SIDE, _SIDE).to(dtype) for _ in range(2))
    product = torch.empty(_SIDE, _SIDE, dtype=dtype)
    source = torch.ones(_COPIED)
    target = torch.zeros(_COPIED)
    return {MM: lambda: torch.mm(a, b, out=product), COPY: lambda: target.copy_(source)}


def limits(
    shape: Shape, case: str, dtype: torch.dtype, input_grad: bool, times: dict[str, list[float]]
) -> list[float]:
    """The shortest time of a step in each round, in seconds, from the times of the probes."""
    work = operations(shape, case, input_grad)
    traffic = compulsory_bytes(shape, case, dtype, input_grad)
    result = []
    for mm, copy in zip(times[MM], times[COPY], strict=True):
        rate, bandwidth = rates(mm, copy)
        result.append(max(work / rate, traffic / bandwidth))
    return result


def rates(mm: float, copy: float) -> tuple[float, float]:
    """Operations per second and bytes per second, from the seconds of the two probes."""
    return 2 * _SIDE**3 / mm, 2 * 4 * _COPIED / copy


def operations(shape: Shape, case: str, input_grad: bool = False) -> int:
    """Multiplications and additions in the products of one step."""
    rows, *widths = shape
    products = [n_in * n_out for n_in, n_out in itertools.pairwise(widths)]
    if case == "inference":
        return 2 * rows * sum(products)
    return 2 * rows * (3 * sum(products) - (0 if input_grad else products[0]))


def compulsory_bytes(shape: Shape, case: str, dtype: torch.dtype, input_grad: bool = False) -> int:
    """The bytes that one step must read from memory or write to it."""
    rows, *widths = shape
    x, *hidden, y = (rows * width for width in widths)
    weights = [n_in * n_out for n_in, n_out in itertools.pairwise(widths)]
    biases = sum(widths[1:])
    parameters = sum(weights) + biases
    if case == "inference":
        elements = x + parameters + y
    elif case == "loss_and_grads":
        elements = x + y + 2 * parameters
    else:
        again = sum(weights[0 if input_grad else 1 :])
        elements = 2 * x + 2 * sum(hidden) + 2 * y + 2 * parameters + again
        elements += x if input_grad else 0
    return elements * dtype.itemsize
