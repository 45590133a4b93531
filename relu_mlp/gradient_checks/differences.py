"""Numerical derivatives: central differences, and what they are worth.

f'(p) = (f(p + h) - f(p - h)) / 2 h + O(h^2) + O(u |f| / h)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: The step of a difference, for an element of size 1: it balances truncation, h^2,
#: and rounding, u / h.
STEP = torch.finfo(torch.float64).eps ** (1 / 3)

#: Of a larger parameter, only so many elements have a numerical gradient.
MOST_ELEMENTS = 4096

#: How many roundings of its value, and of each of its inputs, a function is granted.
#: Sums of n terms in PyTorch round like log n to sqrt n of them.
ROUNDINGS = 64
UNIT_ROUNDOFF = torch.finfo(torch.float64).eps / 2

Function = Callable[..., Tensor]


class Differences(NamedTuple):
    """What `by_differences` finds out for each element of one input."""

    numerical: Tensor  #: the gradient, NaN where it was not computed
    uncertainty: Tensor  #: how far it may be off
    is_at_kink: Tensor  #: bool
    curvature: Tensor  #: |second derivative| by the element, 0 at a kink


def value_of(function: Function, tensors: Mapping[str, Tensor]) -> float:
    with torch.no_grad():
        return function(*(tensor.clone() for tensor in tensors.values())).item()


def _positions(numel: int) -> Sequence[int]:
    """Which elements have a numerical gradient: `MOST_ELEMENTS` of them at most."""
    if numel <= MOST_ELEMENTS:
        return range(numel)
    # Not every second one, say, which may be the same columns in all rows.
    order = torch.randperm(numel, generator=torch.Generator().manual_seed(0), device="cpu")
    return order[:MOST_ELEMENTS].tolist()


def by_differences(
    function: Function,
    tensors: Mapping[str, Tensor],
    name: str,
    loss: float,
    spread: float,
    eps: float,
) -> Differences:
    """The numerical gradient at one input, and what it is worth.

    Args:
        function: takes all inputs in their order and returns a tensor of one element.
        tensors: the inputs by name, those of floating point in float64.
        name: of the input.
        loss: the function's value.
        spread: by how much rounding every input moves that, in units of the rounding.
        eps: the step, for an element of size 1 and below.
    """
    p = tensors[name].contiguous()
    found = Differences(
        numerical=torch.full_like(p, torch.nan),
        uncertainty=torch.full_like(p, torch.inf),
        is_at_kink=torch.zeros_like(p, dtype=torch.bool),
        curvature=torch.zeros_like(p),
    )
    for position in _positions(p.numel()):
        h = eps * max(1.0, abs(p.view(-1)[position].item()))
        f = {0: loss}
        for k in (-2, -1, 1, 2):
            moved = p.clone()
            moved.view(-1)[position] += k * h
            f[k] = value_of(function, {**tensors, name: moved})
        for tensor, value in zip(found, _judged(f, h, spread, eps), strict=True):
            tensor.view(-1)[position] = value
    return found


def _judged(
    f: Mapping[int, float], h: float, spread: float, eps: float
) -> tuple[float, float, bool, float]:
    """The entries of `Differences` for one element p, from f[k] = f(p + k h).

    With the quotients q_1 = (f_1 - f_-1) / 2h and q_2 = (f_2 - f_-2) / 4h, and
    s_k = f_k - 2 f_0 + f_-k: where f is smooth, q_1 - q_2 = O(h^2) and
    s_2 - 4 s_1 = O(h^4). A kink within 2 h, by which f' changes by J, makes at least one
    of |q_1 - q_2| and |s_2 - 4 s_1| / h a sizeable part of J.
    """
    near, far = (f[1] - f[-1]) / (2 * h), (f[2] - f[-2]) / (4 * h)
    curve = (f[1] - 2 * f[0] + f[-1]) / h
    bend = f[2] - 4 * f[1] + 6 * f[0] - 4 * f[-1] + f[-2]
    # What rounding the function's values, its inputs and p + k h does to a quotient, and
    # what is smooth may show of its higher derivatives beside that.
    steepest = max(abs(near), abs(far)) + abs(curve)
    rounding = max(map(abs, f.values())) + spread + steepest * h / eps
    rounding *= ROUNDINGS * UNIT_ROUNDOFF / h
    smooth = rounding + (1e-6 + 100 * eps**2) * steepest + 30 * eps * abs(curve)
    is_at_kink = max(abs(near - far), abs(bend) / h) > smooth
    curvature = 0.0 if is_at_kink else max(0.0, abs(curve) - rounding) / h
    return near, smooth + abs(near - far), is_at_kink, curvature
