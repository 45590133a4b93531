"""What a gradient that was handed in has to do with another one: a factor, its transpose, a sum
over some of its axes, a part that is a multiple of the parameter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, permutations

import torch
from torch import Tensor

from .hypotheses import Mistake
from .rounding import OF_ELEMENT

#: The factors that a derivation may lose or have too much of, but for numbers of rows and such.
SIMPLE = tuple(
    sign * factor
    for number in (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
    for factor in {number, 1 / number}
    for sign in (1, -1)
)


class Closeness:
    """Whether two computations of a gradient may differ by rounding alone."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance

    def __call__(self, left: Tensor, right: Tensor) -> bool:
        if left.shape != right.shape or not bool(right.isfinite().all()):
            return False
        if not left.numel():
            return True
        largest = right.abs().max().item()
        bound = self.tolerance + 2e-13 * largest + OF_ELEMENT * right.abs()
        return bool(((left - right).abs() <= bound).all())

    def is_small(self, tensor: Tensor) -> bool:
        """Whether a gradient is nothing but rounding."""
        return not tensor.numel() or tensor.abs().max().item() <= 4 * self.tolerance


def distribution(gradient: Tensor) -> float:
    """A number that a factor, a transposition and another shape leave as it is."""
    squares = gradient.flatten() / gradient.abs().max() if gradient.numel() else gradient
    squares = squares * squares
    return float(squares.dot(squares) / squares.sum() ** 2) if gradient.numel() else 0.0


def is_alike(of_by_hand: float, other: Tensor) -> bool:
    """Whether `relation` may find anything; this is asked first, because it takes less."""
    return abs(distribution(other) - of_by_hand) <= 1e-6 * of_by_hand


def relation(
    by_hand: Tensor, other: Tensor, sizes: Mapping[int, str], is_close: Closeness
) -> list[Mistake] | None:
    """What makes `other` the gradient by hand: nothing (an empty list), a factor, another shape,
    or two of these; None if it is something else.

    Args:
        sizes: the sizes of the computation, which may be factors, with what they count.
    """
    if is_close(by_hand, other):
        return []
    if is_close.is_small(other):
        return None
    for shaped, mistakes in reshaped(by_hand, other, is_close):
        if is_close(shaped, other):
            return mistakes
        factor = factor_between(shaped, other, is_close)
        if factor is not None:
            known = known_factor(factor, sizes)
            if known is not None:
                return [Mistake("factor of all", {"factor": factor, "why": known}), *mistakes]
    return None


def factor_between(by_hand: Tensor, other: Tensor, is_close: Closeness) -> float | None:
    """c, if by hand is c times the other."""
    if by_hand.shape != other.shape or not other.numel() or not by_hand.isfinite().all():
        return None
    scaled = other / other.abs().max()
    factor = float((by_hand * scaled).sum() / (other * scaled).sum())
    if factor and math.isfinite(factor) and is_close(by_hand / factor, other):
        return factor
    return None


def known_factor(factor: float, sizes: Mapping[int, str]) -> str | None:
    """What a factor is, such as the number of rows; "" for 2 and the like; None if unknown."""
    for simple in SIMPLE:
        if abs(factor / simple - 1) < 1e-9:
            return ""
    counts = {float(n): what for n, what in sizes.items() if n > 1}
    for (n, of_n), (m, of_m) in combinations(list(counts.items()), 2):
        counts.setdefault(n * m, f"{of_n}, and {of_m}")
    for simple in (1.0, 2.0, 0.5):
        for size, what in counts.items():
            for power, said in ((1.0, what), (0.5, f"the square root of {size:g}: {what}")):
                for expected in (size**power * simple, simple / size**power):
                    if abs(abs(factor) / expected - 1) < 1e-9:
                        return said
    return None


def reshaped(
    by_hand: Tensor, other: Tensor, is_close: Closeness
) -> Iterable[tuple[Tensor, list[Mistake]]]:
    """The gradient by hand in the shapes in which it may be the other."""
    if by_hand.shape == other.shape:
        yield by_hand, []
    if by_hand.dim() == other.dim() and 2 <= other.dim() <= 4:
        for order in permutations(range(other.dim())):
            if list(order) != sorted(order):
                permuted = by_hand.permute(order)
                if permuted.shape == other.shape:
                    yield permuted, [Mistake("transposed")]
    if by_hand.shape == other.shape:
        return
    if by_hand.numel() == other.numel():
        yield by_hand.reshape(other.shape), [Mistake("reshaped", {"is_sum": not by_hand.dim()})]
    if by_hand.dim() > other.dim():
        for axes in subsets(by_hand.dim(), by_hand.dim() - other.dim()):
            summed = by_hand.sum(axes)
            if summed.shape == other.shape:
                yield summed, [Mistake("not summed", {"axes": axes, "shape": by_hand.shape})]


def subsets(dims: int, count: int) -> list[tuple[int, ...]]:
    return list(combinations(range(dims), count))


def of_sums(
    by_hand: Tensor, right: Tensor, unsummed: Sequence[Tensor], is_close: Closeness
) -> Mistake | None:
    """Sums that were taken over other axes: of the gradient, or of what it is the sum of."""
    if not by_hand.numel() or not right.numel():
        return None
    first = by_hand.flatten()[0].expand(by_hand.shape)
    if (right.numel() > 1 or by_hand.dim() < right.dim()) and torch.equal(first, by_hand):
        total = right.sum().expand(by_hand.shape)
        if is_close(by_hand, total) and not is_close.is_small(total):
            return Mistake("sum over all", {"is_one": by_hand.numel() == 1})
    for whole in unsummed:
        for count in range(1, whole.dim() + 1):
            for axes in subsets(whole.dim(), count):
                for kind, found in (
                    ("summed over", whole.sum(axes)),
                    ("mean over", whole.mean(axes)),
                ):
                    if found.numel() == by_hand.numel() and is_close(
                        by_hand.flatten(), found.flatten()
                    ):
                        details = {"axes": axes, "shape": whole.shape, "factor": 1.0}
                        if by_hand.shape == right.shape and right.numel() == 1:
                            details["factor"] = by_hand.item() / right.item()
                        return Mistake(kind, details)
    return None


def of_signs(by_hand: Tensor, right: Tensor, is_close: Closeness) -> Mistake | None:
    """Signs that were lost, limits and norms: what is done to a gradient element by element."""
    if by_hand.shape != right.shape or right.numel() < 2:
        return None
    if is_close(by_hand, right.abs()):
        return Mistake("absolute value")
    if is_close(by_hand, right.sign()):
        return Mistake("sign alone")
    if is_close(by_hand, right**2):
        return Mistake("squared")
    for axis in range(right.dim()):
        if right.shape[axis] > 1:
            if is_close(by_hand, right.flip(axis)):
                return Mistake("flipped", {"axis": axis})
            for shift in (1, -1):
                if is_close(by_hand, right.roll(shift, axis)):
                    return Mistake("rolled", {"axis": axis, "shift": shift})
    norm = right.norm()
    if norm and is_close(by_hand, right / norm):
        return Mistake("normalized", {"norm": norm.item()})
    limit = by_hand.abs().max().item()
    at_limit = by_hand.abs() >= limit * (1 - 1e-12)
    if at_limit.sum() > 1 and is_close(by_hand, right.clamp(-limit, limit)):
        return Mistake("clipped", {"limit": limit})
    return None


def of_parameter(
    by_hand: Tensor, right: Tensor, parameter: Tensor, is_close: Closeness
) -> Mistake | None:
    """A term that is a multiple of the parameter, of its sign, or a constant."""
    if by_hand.shape != right.shape or right.numel() < 2 or not by_hand.isfinite().all():
        return None
    error = by_hand - right
    size = max(right.abs().max().item(), error.abs().max().item())
    for kind, term in (
        ("decay", parameter),
        ("sparsity", parameter.sign()),
        ("constant term", torch.ones_like(parameter)),
    ):
        if not term.any() or (kind == "sparsity" and bool((term == term.flatten()[0]).all())):
            continue
        factor = float((error * term).sum() / term.square().sum())
        # The error of a small term is the rounding of the large gradient.
        left = (error - factor * term).abs().max().item()
        is_known = right.numel() > 2 or abs(factor * 1000 - round(factor * 1000)) < 1e-6
        if (
            is_known
            and left <= is_close.tolerance + 1e-13 * size
            and left <= 1e-3 * abs(factor) * term.abs().max().item()
        ):
            return Mistake(kind, {"factor": factor})
    return None


def in_precision(by_hand: Tensor, right: Tensor) -> str | None:
    """The dtype to which a gradient was rounded, if that alone is wrong with it."""
    if by_hand.shape != right.shape or not by_hand.isfinite().all() or not right.numel():
        return None
    error, largest = (by_hand - right).abs(), right.abs().max()
    for dtype, name, units, least in (
        (torch.bfloat16, "half", 4, 3),
        (torch.float16, "half", 4, 3),
        (torch.float32, "single", 64, 1),
    ):
        if right.numel() < least or not torch.equal(by_hand.to(dtype).double(), by_hand):
            continue
        if bool((error <= units * torch.finfo(dtype).eps * largest).all()):
            return name
    return None
