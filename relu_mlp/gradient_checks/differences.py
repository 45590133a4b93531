"""Central differences, and how far they may be off.

f'(p) = (f(p + h) - f(p - h)) / 2 h + O(h^2) + O(u |f| / h)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: The step for an element of size 1. It balances the truncation error, h^2, and the rounding
#: error, u / h.
STEP = torch.finfo(torch.float64).eps ** (1 / 3)

#: At most this many elements of a parameter get a numerical gradient.
MAX_ELEMENTS = 4096

#: The rounding errors allowed in a function's value and in each input, in unit roundoffs.
#: PyTorch's sums of n terms have errors of some log n to sqrt n.
ROUNDINGS = 64
UNIT_ROUNDOFF = torch.finfo(torch.float64).eps / 2

Function = Callable[..., Tensor]


class CentralDifferences(NamedTuple):
    """What central differences tell about each element of one input."""

    numerical: Tensor  #: the gradient; NaN where it was not computed
    uncertainty: Tensor  #: how far it may be off
    is_at_kink: Tensor  #: bool
    curvature: Tensor  #: |d^2 f / d p^2|; 0 at a kink


def value_of(function: Function, tensors: Mapping[str, Tensor]) -> float:
    with torch.no_grad():
        return function(*(tensor.clone() for tensor in tensors.values())).item()


def _positions(numel: int) -> Sequence[int]:
    """Which elements get a numerical gradient: at most `MAX_ELEMENTS`."""
    if numel <= MAX_ELEMENTS:
        return range(numel)
    # At random. At regular distances, they might lie in the same columns of all rows.
    order = torch.randperm(numel, generator=torch.Generator().manual_seed(0), device="cpu")
    return order[:MAX_ELEMENTS].tolist()


def central_differences(
    function: Function,
    tensors: Mapping[str, Tensor],
    name: str,
    loss: float,
    spread: float,
    eps: float,
) -> CentralDifferences:
    """The numerical gradient with respect to one input, and how far it may be off.

    Args:
        function: takes all inputs, in their order, and returns a tensor of one element.
        tensors: the inputs by name, floating-point inputs in float64.
        name: the input.
        loss: the function's value.
        spread: how far rounding every input moves that value, in units of the rounding.
        eps: the step for an element of size 1 or less.
    """
    p = tensors[name].contiguous()
    found = CentralDifferences(
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
        for tensor, value in zip(found, _assess(f, h, spread, eps), strict=True):
            tensor.view(-1)[position] = value
    return found


def _assess(
    f: Mapping[int, float], h: float, spread: float, eps: float
) -> tuple[float, float, bool, float]:
    """The fields of `CentralDifferences` for one element p, from f[k] = f(p + k h).

    Let q_1 = (f_1 - f_-1) / 2h, q_2 = (f_2 - f_-2) / 4h and s_k = f_k - 2 f_0 + f_-k. Where f
    is smooth, q_1 - q_2 = O(h^2) and s_2 - 4 s_1 = O(h^4). A kink within 2 h at which f' jumps
    by J makes |q_1 - q_2| or |s_2 - 4 s_1| / h a sizeable fraction of J.
    """
    near, far = (f[1] - f[-1]) / (2 * h), (f[2] - f[-2]) / (4 * h)
    curve = (f[1] - 2 * f[0] + f[-1]) / h
    bend = f[2] - 4 * f[1] + 6 * f[0] - 4 * f[-1] + f[-2]
    # The error of a quotient from rounding the function's values, its inputs and p + k h; and
    # what the higher derivatives of a smooth function may add to that.
    steepest = max(abs(near), abs(far)) + abs(curve)
    rounding = max(map(abs, f.values())) + spread + steepest * h / eps
    rounding *= ROUNDINGS * UNIT_ROUNDOFF / h
    smooth = rounding + (1e-6 + 100 * eps**2) * steepest + 30 * eps * abs(curve)
    is_at_kink = max(abs(near - far), abs(bend) / h) > smooth
    curvature = 0.0 if is_at_kink else max(0.0, abs(curve) - rounding) / h
    return near, smooth + abs(near - far), is_at_kink, curvature
