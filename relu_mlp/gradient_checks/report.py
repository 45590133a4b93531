"""The report of `check_gradients`: elements, findings, and a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .rounding import allowed, ulp
from .wording import in_words


@dataclass(frozen=True)
class Element:
    """One element of the gradient of one parameter, computed in three ways."""

    parameter: str
    index: tuple[int, ...]
    by_hand: float  #: NaN if there is none
    autograd: float
    numerical: float  #: NaN where it was not computed
    uncertainty: float  #: how far the numerical value may be off
    is_at_kink: bool  #: the numerical value means nothing
    difference: float  #: by hand - autograd
    ulps: float  #: |difference| in units in the last place of autograd's value
    instead: str = ""  #: what the table says where there is no number by hand

    def __str__(self) -> str:
        name = self.parameter + (str(list(self.index)) if self.index else "")
        numerical = f"{self.numerical:.10g}"
        if self.is_at_kink:
            numerical = "at a kink"
        elif math.isnan(self.numerical) and self.uncertainty == math.inf:
            numerical = "not computed"
        by_hand, difference = f"{self.by_hand:.11g}", f"{self.difference:.1e}"
        ulps = f"{self.ulps:.2g}"
        if self.instead:
            by_hand, difference, ulps = self.instead, "-", "-"
        return (
            f"{name:<18} {by_hand:>18} {self.autograd:>18.11g} {numerical:>18} "
            f"{difference:>10} {ulps:>8}"
        )


HEAD = (
    f"{'':<18} {'by hand':>18} {'autograd':>18} {'numerical':>18} {'hand-auto':>10} {'in ulps':>8}"
)


@dataclass(frozen=True)
class ParameterReport:
    """The results for one parameter. The tensors are float64 and have its shape."""

    name: str
    by_hand: Tensor | None  #: None if it is missing; it may have another shape
    autograd: Tensor
    numerical: Tensor  #: NaN where it was not computed
    uncertainty: Tensor  #: how far the numerical value may be off
    is_at_kink: Tensor  #: bool: where the numerical value means nothing
    #: how large |by hand - autograd| may be by rounding, in addition to `OF_ELEMENT` of
    #: autograd's value
    tolerance: float
    mistake: str = ""  #: what is wrong by hand, in words; "" if nothing is

    @property
    def has_shape(self) -> bool:
        """Whether the gradient by hand has the shape of the parameter."""
        return self.by_hand is not None and self.by_hand.shape == self.autograd.shape

    @property
    def difference(self) -> Tensor:
        """By hand - autograd; 0 where both are NaN or the same infinity, or if none was given."""
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
    def is_wrong_by_hand(self) -> bool:
        """Whether a gradient by hand was given that is not the gradient."""
        return self.by_hand is not None and not (self.has_shape and not self.is_wrong.any())

    @property
    def is_disputed(self) -> Tensor:
        """bool: where the numerical value contradicts autograd's by more than its uncertainty."""
        gap = (self.numerical - self.autograd).abs()
        rounding = allowed(self.autograd, self.tolerance)
        return (gap > self.uncertainty + rounding) & ~self.is_at_kink

    @property
    def ok(self) -> bool:
        """By hand and autograd agree, and no numerical value contradicts them."""
        has_shape = self.by_hand is None or self.has_shape
        return has_shape and not (self.is_wrong | self.is_disputed).any()

    def worst(self, count: int) -> list[Element]:
        """The elements in which by hand and autograd differ most, the worst first."""
        differences = self.difference.abs().flatten()
        order = differences.topk(min(count, differences.numel())).indices
        return [self.element(position) for position in order.tolist()]

    def element(self, position: int) -> Element:
        """The element at a position of the flattened parameter."""

        def at(tensor: Tensor) -> float:
            return tensor.flatten()[position].item()

        by_hand = self.by_hand if self.by_hand is not None and self.has_shape else None
        instead = "not given" if self.by_hand is None else "" if self.has_shape else "other shape"
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
            instead,
        )

    def findings(self) -> Iterator[str]:
        """What to say about the parameter: sentences that follow its name and a colon."""
        if self.by_hand is None:
            yield "no gradient by hand was given"
        elif self.is_wrong_by_hand:
            yield f"wrong by hand: {self.mistake}"
        if self.is_disputed.any():
            yield self.dispute()
        if self.is_at_kink.any():
            yield (
                f"{int(self.is_at_kink.sum())} of {self.autograd.numel()} elements are so near a "
                "kink of the loss that the numerical value means nothing"
            )

    def dispute(self) -> str:
        """How the numerical gradient contradicts autograd's."""
        gaps = (self.numerical - self.autograd).abs().masked_fill(~self.is_disputed, 0)
        at = int(gaps.flatten().argmax())
        worst = self.element(at)
        place = self.name + (str(list(worst.index)) if worst.index else "")
        said = (
            f"the difference quotient contradicts autograd, as in {place} (autograd "
            f"{worst.autograd:.8g}, numerical {worst.numerical:.8g}, uncertain by "
            f"{worst.uncertainty:.1g}), in {int(self.is_disputed.sum())} of "
            f"{self.autograd.numel()} elements"
        )
        known = ~self.numerical.isnan() & ~self.is_at_kink
        autograd, numerical = self.autograd[known], self.numerical[known]
        if len(autograd) > 1 and (numerical * autograd).sum():
            factor = float((numerical * autograd).sum() / numerical.square().sum())
            factor = simplest(factor)
            bound = self.uncertainty[known] * max(1.0, abs(factor))
            if factor and ((autograd - factor * numerical).abs() <= bound).all():
                said += f"; autograd's is {in_words(factor)} the numerical"
        return (
            f"{said}. So the derivative that autograd was given is wrong: that of a custom "
            "Function or operator, or a detach()"
        )


def simplest(factor: float) -> float:
    """A factor that was measured, as the simple fraction that it is near."""
    for denominator in range(1, 13):
        numerator = round(factor * denominator)
        if numerator and abs(factor * denominator - numerator) < 1e-5:
            return numerator / denominator
    return factor


@dataclass(frozen=True, repr=False)
class GradientReport:
    """What `check_gradients` returns; `print` it for a table.

    It is true if all is right: ``assert check_gradients(f, inputs)`` is a test, and so is
    ``assert check_gradients(f, inputs).ok``. Its `repr`, which a failed test shows, begins with
    what is wrong.
    """

    subject: str  #: what was checked
    notes: tuple[str, ...]  #: how it was checked
    loss: float
    eps: float  #: the step of the differences, relative to max(1, |element|)
    parameters: tuple[ParameterReport, ...]
    problems: tuple[str, ...] = ()  #: what else is wrong with a derivative, in sentences
    second: GradientReport | None = None  #: on the second derivative, if that was asked for

    @property
    def ok(self) -> bool:
        """By hand and autograd agree everywhere, no numerical value contradicts them, and nothing
        else that was asked for is wrong."""
        is_right = all(parameter.ok for parameter in self.parameters) and not self.problems
        return is_right and (self.second is None or self.second.ok)

    def __bool__(self) -> bool:
        return self.ok

    def findings(self) -> Iterator[str]:
        """All that is to be said, as sentences that begin with the name of a parameter."""
        for parameter in self.parameters:
            yield from (f"{parameter.name}: {finding}" for finding in parameter.findings())
        yield from self.problems
        if self.second is not None:
            yield from (f"second derivative by {finding}" for finding in self.second.findings())

    def __repr__(self) -> str:
        """The verdict and the first findings, as short as pytest shows an object without -vv."""
        if self.ok:
            return f"<GradientReport OK: {self.subject}>"
        wrong = [p for p in self.parameters if not p.ok]
        first = [f"{p.name}: {finding}" for p in wrong for finding in p.findings()]
        said = "; ".join(first + [f for f in self.findings() if f not in first])
        return shortened(f"<GradientReport NOT OK: {said}>", REPR)

    @property
    def max_error(self) -> float:
        """The largest |by hand - autograd| / max(1, |autograd|)."""
        return max((parameter.max_error for parameter in self.parameters), default=0.0)

    def worst(self, count: int = 8) -> list[Element]:
        """The elements in which by hand and autograd differ most, the worst first.

        Args:
            count: how many at most, over all parameters.

        Returns:
            A list of `Element`.
        """
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
        lines += (f"{finding}." for finding in self.findings())
        lines.append(
            f"{'OK' if self.ok else 'NOT OK'}. By hand and autograd differ by at most "
            f"{self.max_error:.2g} (of autograd's value, where that is above 1)."
        )
        return "\n".join(lines)


#: pytest cuts the middle out of a longer one.
REPR = 238


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 5].rstrip()} ...>"


def index_of(position: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The index of a position in the flattened tensor."""
    # Not by torch.unravel_index, which imports sympy: that takes seconds.
    index: tuple[int, ...] = ()
    for size in reversed(shape):
        position, place = divmod(position, size)
        index = (place, *index)
    return index
