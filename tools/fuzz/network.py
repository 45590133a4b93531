"""A random network, and whether no sum in it is rounded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import support
from relu_mlp import functional, ops, reference

from .case import Case

DTYPES = support.DTYPES

#: Bits of a significand: integers up to 2 to this power are exact.
PRECISION = {torch.float64: 53, torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}


class Network:
    """x, weights, biases (None where one is missing), an activation and a gradient of y."""

    def __init__(
        self, case: Case, dtypes: Sequence[torch.dtype] = support.DTYPES, scale: int = -1
    ) -> None:
        r = case.r
        if scale < 0:
            scale = r.choices([0, 1, 2], [20, 6, 1])[0]
        self.dtype = r.choice(dtypes)
        while True:
            layers = r.choice([1, 1, 2, 2, 2, 3, 3, 4])
            rows, sizes = case.rows(scale), [case.size(scale) for _ in range(layers + 1)]
            if layers == 1 or (rows * max(sizes) <= 150_000 and max(sizes) <= 300):
                break
        info = torch.finfo(self.dtype)
        self.values = r.choices(
            ["integers", "not finite", "subnormal", "large", "real"], [12, 3, 1, 1, 4]
        )[0]
        self.unit = 1.0
        if self.values == "subnormal":
            self.unit = info.smallest_normal * info.eps
        elif self.values == "large":
            self.unit = 2.0 ** (math.frexp(info.max)[1] - PRECISION[self.dtype] - 1)

        def numbers(shape: list[int], density: float = 1, unit: float = 1) -> Tensor:
            if self.values == "real":
                values = torch.randn(shape, generator=case.generator, dtype=torch.float64)
                values /= max(1, shape[-1]) ** 0.5
            else:
                values = case.integers(shape, density) * unit
            if self.values == "not finite" and values.numel() and case.chance(0.4):
                at = r.randrange(values.numel())
                values.view(-1)[at] = r.choice([math.nan, math.inf, -math.inf])
            return case.placed(values.to(self.dtype))

        pairs = [*itertools.pairwise(sizes)]
        self.x = numbers(case.shape(rows, sizes[0]), unit=self.unit)
        self.weights = [numbers([n, m], min(1.0, 6 / max(1, n, m))) for m, n in pairs]
        bias = r.choice(["all", "all", "none", "some"])
        self.biases: list[Tensor | None] | None = None
        if bias != "none":
            self.biases = [
                None if bias == "some" and case.chance(0.5) else numbers([n], unit=self.unit)
                for n in sizes[1:]
            ]
        self.activation = r.choice([None, None, "relu", "relu", "sigmoid", "tanh"])
        self.grad = numbers([*self.x.shape[:-1], sizes[-1]], min(1.0, 60 / max(1, rows)))
        case.note("values", self.values)
        case.note("x", self.x)
        case.note("weights", self.weights)
        case.note("biases", self.biases)
        case.note("output_activation, grad_output", (self.activation, self.grad))

    @property
    def name(self) -> str:
        return functional.activation_name(self.activation)

    def operands(self) -> list[Any]:
        """x, weights and biases as the operators take them."""
        missing = ops.NO_TENSOR
        return [self.x, self.weights, [missing if b is None else b for b in self.biases or []]]

    def is_exact(self, dtype: torch.dtype) -> bool:
        """Whether this dtype represents every sum of both passes exactly."""
        if self.activation in ("sigmoid", "tanh") or self.values == "real":
            return False
        if self.values == "subnormal" and self.dtype == torch.bfloat16:
            return False  # the products of pairs of bfloat16 flush subnormal numbers to 0

        def magnitude(t: Tensor) -> Tensor:
            return t.detach().double().nan_to_num(0, 0, 0).abs()

        a = [reference.as_matrix(magnitude(self.x)) / self.unit]
        weights = [*map(magnitude, self.weights)]
        largest = 1.0
        for layer, weight in enumerate(weights):
            bias = self.biases[layer] if self.biases else None
            a.append(a[-1] @ weight.T + (0 if bias is None else magnitude(bias) / self.unit))
        delta = reference.as_matrix(magnitude(self.grad)) + 1
        for layer in reversed(range(len(weights))):
            sums = [a[layer + 1], delta, delta.T @ a[layer], delta.sum(0)]
            largest = max([largest, *(float(t.max()) for t in sums if t.numel())])
            delta = delta @ weights[layer]
        largest = max([largest, *(float(t.max()) for t in [delta] if t.numel())])
        return largest < 2 ** PRECISION[dtype]
