"""Error bounds: how far rounding may move a network's outputs and gradients.

The error of a sum of n products, in any order, in arithmetic of unit roundoff u, is at
most gamma(n) = n u / (1 - n u) times the sum of the absolute values of its terms
(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). This module
propagates such bounds through the layers together with the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations import ACTIVATION_BACKWARDS, ACTIVATIONS, ROWS


@dataclass(frozen=True)
class Arithmetic:
    """The unit roundoff of a dtype, and that of its sums, which for 16-bit dtypes is float32's."""

    u: float
    u_sums: float
    tiny: float  #: the rounding error of a number near 0

    @classmethod
    def of(cls, dtype: torch.dtype, sums: torch.dtype | None = None) -> Arithmetic:
        info = torch.finfo(dtype)
        u_sums = torch.finfo(sums or torch.promote_types(dtype, torch.float32)).eps / 2
        return cls(info.eps / 2, u_sums, info.smallest_normal * info.eps)


@dataclass(frozen=True)
class Bounded:
    """Values in float64, and how far a computation in another dtype may be from them."""

    value: Tensor
    bound: Tensor

    @property
    def largest(self) -> Tensor:
        return self.value.abs() + self.bound

    @property
    def T(self) -> Bounded:
        return Bounded(self.value.T, self.bound.T)

    def where(self, mask: Tensor) -> Bounded:
        return Bounded(self.value * mask, self.bound * mask)

    def stored(self, a: Arithmetic, roundings: int = 1) -> Bounded:
        return Bounded(self.value, self.bound + roundings * a.u * self.largest + a.tiny)

    def times(self, other: Bounded, a: Arithmetic, roundings: int = 1) -> Bounded:
        value = self.value * other.value
        carried = self.largest * other.largest - value.abs()
        return Bounded(value, carried).stored(a, roundings)

    def product(self, other: Bounded, a: Arithmetic, bias: Tensor | None = None) -> Bounded:
        """self @ other + bias."""
        value, largest = self.value @ other.value, self.largest @ other.largest
        carried = largest - self.value.abs() @ other.value.abs()
        if bias is not None:
            value, largest = value + bias, largest + bias.abs()
        n = (self.value.shape[1] + (bias is not None)) * a.u_sums
        return Bounded(value, carried + n / (1 - n) * largest).stored(a)


def exactly(tensor: Tensor) -> Bounded:
    value = tensor.detach().double()
    return Bounded(value, torch.zeros_like(value))


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    a: Arithmetic,
) -> tuple[list[Bounded], Tensor]:
    """x, the hidden activations and y, with bounds; and which rows are clear.

    A row is clear if rounding can't switch any of its ReLUs. The bounds hold if all rows
    are clear.

    Args:
        x: (rows, in_features).
        weights, biases: one of each for every layer.
        activation: the operators' name of the output activation.
    """
    activations, clear = [exactly(x)], torch.ones(x.shape[0], dtype=torch.bool)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        z = activations[-1].product(exactly(weight).T, a, bias.double())
        if layer < len(weights) - 1 or activation == "relu":
            clear &= (z.value.abs() > z.bound).all(1)
            z = z.where(z.value > 0)
        activations.append(z)
    if activation in STEEPEST:
        # The error of PyTorch's functions is a few roundings.
        value = ACTIVATIONS[activation](z.value)
        y = Bounded(value, STEEPEST[activation][0] * z.bound).stored(a, roundings=4)
        activations[-1] = y
    return activations, clear


#: The largest |phi'(z)|, and the largest |d phi' / d y| with phi' as a function of y, where phi is
#: smooth.
STEEPEST = {row.name: row.steepest for row in ROWS if row.curvature is not None}


def gradients(
    activations: Sequence[Bounded],
    target: Tensor,
    weights: Sequence[Tensor],
    activation: str,
    a: Arithmetic,
) -> list[Bounded]:
    """The gradients of the sum of squared errors: for all weights, then for all biases.

    Args:
        activations: as `forward` returns them; all rows must be clear.
        target: (rows, out_features).
    """
    y = activations[-1]
    slope = ACTIVATION_BACKWARDS[activation](torch.ones_like(y.value), y.value)
    changing = STEEPEST.get(activation, (0.0, 0.0))[1]
    error = Bounded(y.value - target.double(), y.bound).stored(a)
    delta = Bounded(2 * error.value, 2 * error.bound)
    delta = delta.times(Bounded(slope, changing * y.bound), a, roundings=4)
    ones = exactly(torch.ones(y.value.shape[0], 1))
    of_weights: list[Bounded] = []
    of_biases: list[Bounded] = []
    for layer in reversed(range(len(weights))):
        of_weights.insert(0, delta.T.product(activations[layer], a))
        sums = delta.T.product(ones, a)
        of_biases.insert(0, Bounded(sums.value[:, 0], sums.bound[:, 0]))
        if layer > 0:
            delta = delta.product(exactly(weights[layer]), a)
            delta = delta.where(activations[layer].value > 0)
    return of_weights + of_biases
