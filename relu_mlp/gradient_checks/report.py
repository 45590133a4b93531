"""What `check_gradients` found, and how it is said: elements, findings, a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: |by hand - autograd| may be this fraction of the element, beside the tolerance of its
#: parameter. Rounding makes some 1e-13 of it, and a wrong term far more than 1e-9.
OF_ELEMENT = 2.0**-30


@dataclass(frozen=True)
class Element:
    """One entry of the gradient of one parameter, three times over."""

    parameter: str
    index: tuple[int, ...]
    by_hand: float  #: NaN if none was given, or one of another shape
    autograd: float
    numerical: float  #: NaN where it was not computed
    uncertainty: float  #: how far the numerical value may be off
    is_at_kink: bool  #: the numerical value means nothing
    difference: float  #: by hand - autograd
    ulps: float  #: |difference| in units in the last place of autograd's value

    def __str__(self) -> str:
        name = self.parameter + (str(list(self.index)) if self.index else "")
        numerical = "at a kink" if self.is_at_kink else f"{self.numerical:.10g}"
        return (
            f"{name:<18} {self.by_hand:>18.11g} {self.autograd:>18.11g} {numerical:>18} "
            f"{self.difference:>10.1e} {self.ulps:>8.2g}"
        )


HEAD = (
    f"{'':<18} {'by hand':>18} {'autograd':>18} {'numerical':>18} {'hand-auto':>10} {'in ulps':>8}"
)


@dataclass(frozen=True)
class ParameterReport:
    """What was found for one parameter. The tensors are float64 and have its shape."""

    name: str
    by_hand: Tensor | None  #: None if none was given; of another shape if that was given
    autograd: Tensor
    numerical: Tensor  #: NaN where it was not computed
    uncertainty: Tensor  #: how far the numerical value may be off
    is_at_kink: Tensor  #: bool: where the numerical value means nothing
    #: the largest |by hand - autograd| that is taken for rounding, beside `OF_ELEMENT` of
    #: autograd's value
    tolerance: float

    @property
    def has_shape(self) -> bool:
        """Whether the gradient by hand has the shape of the parameter."""
        return self.by_hand is not None and self.by_hand.shape == self.autograd.shape

    @property
    def difference(self) -> Tensor:
        """By hand - autograd: 0 where both are NaN or the same infinity, and if none was given."""
        if self.by_hand is None:
            return torch.zeros_like(self.autograd)
        if not self.has_shape:
            return torch.full_like(self.autograd, torch.inf)
        is_same = (self.by_hand == self.autograd) | (self.by_hand.isnan() & self.autograd.isnan())
        difference = (self.by_hand - self.autograd).masked_fill(is_same, 0)
        return difference.masked_fill(difference.isnan(), torch.inf)

    @property
    def max_error(self) -> float:
        """The largest |by hand - autograd| / max(1, |autograd|)."""
        if not self.autograd.numel():
            return 0.0 if self.by_hand is None or self.has_shape else torch.inf
        scale = self.autograd.abs().nan_to_num(nan=1.0, posinf=1.0).clamp(min=1)
        return (self.difference.abs() / scale).max().item()

    @property
    def is_wrong(self) -> Tensor:
        """bool: where by hand and autograd differ by more than rounding."""
        return self.difference.abs() > allowed(self.autograd, self.tolerance)

    @property
    def is_disputed(self) -> Tensor:
        """bool: where the numerical value contradicts autograd's, beyond all uncertainty."""
        gap = (self.numerical - self.autograd).abs()
        rounding = allowed(self.autograd, self.tolerance)
        return (gap > self.uncertainty + rounding) & ~self.is_at_kink

    @property
    def ok(self) -> bool:
        """By hand and autograd agree, and no numerical value contradicts them."""
        has_shape = self.by_hand is None or self.has_shape
        return has_shape and not (self.is_wrong | self.is_disputed).any()

    def worst(self, count: int) -> list[Element]:
        """The elements where by hand and autograd differ most, worst first."""
        differences = self.difference.abs().flatten()
        order = differences.topk(min(count, differences.numel())).indices
        return [self.element(position) for position in order.tolist()]

    def element(self, position: int) -> Element:
        """The entry at a position of the flattened parameter."""

        def at(tensor: Tensor) -> float:
            return tensor.flatten()[position].item()

        by_hand = self.by_hand if self.by_hand is not None and self.has_shape else None
        return Element(
            self.name,
            index_of(position, self.autograd.shape),
            torch.nan if by_hand is None else at(by_hand),
            at(self.autograd),
            at(self.numerical),
            at(self.uncertainty),
            bool(at(self.is_at_kink)),
            at(self.difference),
            at(self.difference.abs() / ulp(self.autograd)),
        )

    def findings(self) -> Iterator[str]:
        """Sentences, each to follow the name of the parameter."""
        if self.by_hand is None:
            yield "no gradient by hand was given"
        elif not self.has_shape or self.is_wrong.any():
            yield "wrong by hand: " + diagnosis(self.by_hand, self.autograd, self.tolerance)
        if self.is_disputed.any():
            at = int(self.is_disputed.flatten().int().argmax())
            yield f"the difference quotient contradicts autograd, as in {self.element(at)}".strip()
        if self.is_at_kink.any():
            yield (
                f"{int(self.is_at_kink.sum())} of {self.autograd.numel()} elements are so near a "
                "kink of the loss that the numerical value means nothing"
            )


@dataclass(frozen=True)
class GradientReport:
    """What `check_gradients` returns; `print` it for a table."""

    subject: str  #: what was checked
    notes: tuple[str, ...]  #: how it was checked
    loss: float
    eps: float  #: the step of the differences, relative to max(1, |element|)
    parameters: tuple[ParameterReport, ...]

    @property
    def ok(self) -> bool:
        """By hand and autograd agree everywhere, and no numerical value contradicts them."""
        return all(parameter.ok for parameter in self.parameters)

    @property
    def max_error(self) -> float:
        """The largest |by hand - autograd| / max(1, |autograd|)."""
        return max((parameter.max_error for parameter in self.parameters), default=0.0)

    def worst(self, count: int = 8) -> list[Element]:
        """The elements where by hand and autograd differ most, worst first."""
        elements = [e for parameter in self.parameters for e in parameter.worst(count)]
        return sorted(elements, key=lambda e: -abs(e.difference))[:count]

    def __str__(self) -> str:
        lines = [f"The gradient of {self.subject}.", *self.notes, "", HEAD]
        numel = sum(parameter.autograd.numel() for parameter in self.parameters)
        if numel <= 24:
            for parameter in self.parameters:
                lines += (str(parameter.element(n)) for n in range(parameter.autograd.numel()))
        else:
            lines += map(str, self.worst())
            lines.append(f"(of {numel} elements, those where by hand and autograd differ most)")
        lines.append("")
        for parameter in self.parameters:
            lines += (f"{parameter.name}: {finding}." for finding in parameter.findings())
        lines.append(
            f"{'OK' if self.ok else 'NOT OK'}. By hand and autograd differ by at most "
            f"{self.max_error:.2g} (of autograd's value, where that is above 1)."
        )
        return "\n".join(lines)


def index_of(position: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Of a position in the flattened tensor."""
    # torch.unravel_index would load sympy, which takes seconds.
    index: tuple[int, ...] = ()
    for size in reversed(shape):
        position, place = divmod(position, size)
        index = (place, *index)
    return index


def ulp(tensor: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The distance between neighbouring numbers of a dtype at |tensor|; a float64 tensor."""
    info = torch.finfo(dtype)
    magnitude = tensor.double().abs().nan_to_num(posinf=info.max).clamp(min=info.smallest_normal)
    return info.eps * torch.exp2(torch.frexp(magnitude).exponent.double() - 1)


def allowed(gradient: Tensor, tolerance: float) -> Tensor:
    """How far another may be from each element of a gradient."""
    return tolerance + OF_ELEMENT * gradient.abs().nan_to_num(0, 0, 0)


def diagnosis(by_hand: Tensor, autograd: Tensor, tolerance: float) -> str:
    """What a wrong gradient looks like, next to the right one; to find the mistake by."""

    def is_close(left: Tensor, right: Tensor) -> bool:
        return left.shape == right.shape and bool(
            ((left - right).abs() <= allowed(right, tolerance)).all()
        )

    if by_hand.shape != autograd.shape:
        shapes = f"it has shape {tuple(by_hand.shape)} instead of {tuple(autograd.shape)}"
        if autograd.dim() == 2 and is_close(by_hand, autograd.T):
            return f"{shapes}; it is the transpose"
        if by_hand.numel() == 1 and is_close(by_hand.reshape(()), autograd.sum()):
            return f"{shapes}; it is the sum over all elements of the gradient"
        return shapes
    if not by_hand.isfinite().all() and autograd.isfinite().all():
        return "it is not finite"
    if is_close(by_hand, torch.zeros_like(by_hand)):
        return "it is 0"
    if autograd.dim() == 2 and is_close(by_hand, autograd.T):
        return "it is the transpose"
    if autograd.numel() > 1 and is_close(by_hand, autograd.sum().expand_as(by_hand)):
        return "every element is the sum over all elements of the gradient"
    # Before the factors: of one element, every error is one.
    error = (by_hand - autograd).abs()
    if error.max() < 2.0**-16 * autograd.abs().max():
        return "it is right to some digits only, as if computed in single precision"
    factor = float((by_hand * autograd).sum() / autograd.square().sum())
    if is_close(by_hand, factor * autograd):
        return f"it is {in_words(factor)} autograd's"
    return where_it_is_wrong(error > allowed(autograd, tolerance))


def in_words(factor: float) -> str:
    """A factor between two gradients; a simple fraction as such."""
    if abs(factor + 1) < 1e-6:
        return "minus"
    if abs(factor - round(factor)) < 1e-6 * abs(factor):
        return f"{round(factor)} times"
    if abs(1 / factor - round(1 / factor)) < 1e-6 / abs(factor):
        return f"{'-' if factor < 0 else ''}1/{abs(round(1 / factor))} of"
    return f"{factor:.6g} times"


def where_it_is_wrong(is_wrong: Tensor) -> str:
    """Which elements are wrong; which rows or columns, if those are some and not all."""
    said = f"{int(is_wrong.sum())} of {is_wrong.numel()} elements are wrong"
    if is_wrong.dim() == 1:
        return f"{said}{_named('index', 'indices', is_wrong)}"
    if is_wrong.dim() == 2:
        rows, columns = is_wrong.any(1), is_wrong.any(0)
        said += _named("row", "rows", rows) + _named("column", "columns", columns)
    return said


def _named(singular: str, plural: str, is_wrong: Tensor) -> str:
    places = is_wrong.nonzero().flatten().tolist()
    if len(places) == len(is_wrong):
        return ""
    shown = ", ".join(map(str, places[:5])) + (", ..." if len(places) > 5 else "")
    return f", all in {singular if len(places) == 1 else plural} {shown}"
