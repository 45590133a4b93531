"""The search for the mistake in a derivation, the cheapest first and two at a time.

A mistake is named only if making it in the right backward pass gives the gradient that was handed
in, to rounding, in every element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .hypotheses import (
    LAYERS,
    VIEWS,
    Hypothesis,
    Mistake,
    hypotheses,
    real_uses,
)
from .relations import (
    Closeness,
    factor_between,
    in_precision,
    of_parameter,
    of_signs,
    of_sums,
    reshaped,
    relation,
)
from .tape import Backward, Change, Tape, record

Function = Callable[..., Tensor]

#: How many steps may be taken backwards: below a second for 10^4 parameters.
MAX_WORK = 6000
#: A tape with more numbers than this is not searched.
MAX_NUMBERS = 2_000_000
#: How many mistakes are found one after the other, each in the pass with those before.
MAX_DEPTH = 3


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with the gradient of one input."""

    mistakes: tuple[Mistake, ...]  #: none if it could not be named
    all_above: tuple[str, ...] = ()  #: inputs of later layers, whose gradients are right
    layer: int = 0  #: the last layer, counted from 1, with a wrong gradient; 0 if unknown
    beside: tuple[str, ...] = ()  #: inputs of the same layer whose gradients are right


def diagnose(
    function: Function,
    tensors: Mapping[str, Tensor],
    by_hand: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    tolerances: Mapping[str, float],
    wrong: Sequence[str],
) -> tuple[dict[str, Diagnosis], Tape | None]:
    """What is wrong with each gradient that is.

    Args:
        function: takes all inputs in their order.
        tensors: the inputs in float64.
        by_hand: the gradients that were handed in.
        right: the gradients of all inputs that are checked.
        tolerances: how far each may be off by rounding.
        wrong: the inputs whose gradients by hand are wrong.
    """
    search = _Search(function, tensors, by_hand, right, tolerances)
    found = search.run(wrong)
    return search.placed(wrong, found), search.tape


class _Search:
    def __init__(
        self,
        function: Function,
        tensors: Mapping[str, Tensor],
        by_hand: Mapping[str, Tensor],
        right: Mapping[str, Tensor],
        tolerances: Mapping[str, float],
    ) -> None:
        self.tensors, self.by_hand, self.right = tensors, by_hand, right
        self.is_close = {name: Closeness(tolerances[name]) for name in right}
        self.tape = self._checked_tape(function)
        self.sizes = self._sizes()
        self.work = 0

    def _checked_tape(self, function: Function) -> Tape | None:
        """The tape, if the backward pass over it gives autograd's gradients."""
        tape = record(function, self.tensors, list(self.right))
        if tape is None or sum(value.numel() for value in tape.values) > MAX_NUMBERS:
            return None
        try:
            backward = Backward(tape)
        except RuntimeError:  # an operator without a derivative
            return None
        for name, number in tape.inputs.items():
            if not self.is_close[name](backward.gradient(number), self.right[name]):
                return None
        return tape

    def _sizes(self) -> dict[int, str]:
        """The sizes that a factor may be, with what they count."""
        if self.tape is None:
            return {n: f"{n}" for tensor in self.tensors.values() for n in tensor.shape}
        sizes: dict[int, str] = {}
        for number, value in enumerate(self.tape.values):
            if value.dim() and self.tape.is_active[number] and number in self.tape.maker:
                if self.tape.steps[self.tape.maker[number]].name not in VIEWS:
                    sizes.setdefault(len(value), f"{len(value)} is the number of rows")
        for value in self.tape.values:
            for n in value.shape:
                sizes.setdefault(n, f"{n} is a size of a tensor")
            sizes.setdefault(value.numel(), f"{value.numel()} is a number of elements")
        return sizes

    # -- What needs no backward pass ---------------------------------------------

    def run(self, wrong: Sequence[str]) -> dict[str, tuple[Mistake, ...]]:
        found: dict[str, tuple[Mistake, ...]] = {}
        weak: dict[str, tuple[Mistake, ...]] = {}
        for name in wrong:
            mistakes, is_strong = self._at_once(name)
            if mistakes:
                (found if is_strong else weak)[name] = mistakes
        left = [name for name in wrong if name not in found]
        if left and self.tape is not None:
            found |= self._by_backward_passes(self.tape, left, found, weak)
        for name in wrong:
            if name not in found:
                found[name] = weak.get(name, ())
        return found

    def _at_once(self, name: str) -> tuple[tuple[Mistake, ...], bool]:
        """What is seen from the gradients alone; whether more than one element says so."""
        by_hand, right, is_close = self.by_hand[name], self.right[name], self.is_close[name]
        if not by_hand.isfinite().all() and right.isfinite().all():
            return (Mistake("not finite"),), True
        if not right.isfinite().all():
            return (), True
        if by_hand.shape == right.shape and is_close(by_hand, torch.zeros_like(by_hand)):
            return (Mistake("zero"),), True
        precision = in_precision(by_hand, right)
        if precision:
            return (Mistake("precision", {"name": precision}),), True
        is_strong = right.numel() > 1
        small = of_parameter(by_hand, right, self.tensors[name], is_close)
        if small is not None and small.kind == "decay":
            return (small,), True
        for shaped, mistakes in reshaped(by_hand, right, is_close):
            if is_close(shaped, right):
                return tuple(mistakes), True
        sums = of_sums(by_hand, right, (), is_close)
        if sums:
            return (sums,), True
        others = [other for other in self.right if other != name]
        for other in others:
            of_other = self.right[other]
            if not self.is_close[other].is_small(of_other) and of_other.numel() > 1:
                for shaped, mistakes in reshaped(by_hand, of_other, self.is_close[other]):
                    if self.is_close[other](shaped, of_other):
                        exchanged = Mistake("exchanged", {"name": other})
                        return (exchanged, *mistakes), True
        found = relation(by_hand, right, self.sizes, is_close)
        if found is not None:
            return tuple(found), is_strong
        factor = factor_between(by_hand, right, is_close)
        if factor is not None and right.numel() > 1:
            return (Mistake("factor of all", {"factor": factor, "why": ""}),), right.numel() > 2
        if small is not None:
            return (small,), True
        signs = of_signs(by_hand, right, is_close)
        return ((signs,) if signs else ()), True

    # -- What needs one ----------------------------------------------------------

    def _by_backward_passes(
        self,
        tape: Tape,
        wrong: Sequence[str],
        strong: Mapping[str, tuple[Mistake, ...]],
        weak: Mapping[str, tuple[Mistake, ...]],
    ) -> dict[str, tuple[Mistake, ...]]:
        """Passes with one change each; then with one more, in the pass that explains most."""
        found: dict[str, tuple[Mistake, ...]] = {}
        known, made = Change(), ()
        for _ in range(MAX_DEPTH):
            left = [name for name in wrong if name not in found]
            if not left:
                break
            backward = Backward(tape, known)
            if made:
                found |= self._unsummed(backward, left, made)
                left = [name for name in left if name not in found]
            else:
                found |= self._unsummed(backward, left, ())
                left = [name for name in left if name not in found]
            if not left:
                break
            best = self._best(backward, left, strong)
            if best is None:
                break
            hypothesis, explained = best
            for name, mistakes in explained.items():
                found[name] = (*mistakes[0], *made, *mistakes[1])
            known, made = known | hypothesis.change, (*made, hypothesis.mistake)
        left = [name for name in wrong if name not in found and name not in weak]
        if left and not found:
            found |= self._pairs(tape, left)
        return found

    def _best(
        self, backward: Backward, left: Sequence[str], strong: Mapping[str, tuple[Mistake, ...]]
    ) -> tuple[Hypothesis, dict[str, tuple[tuple[Mistake, ...], tuple[Mistake, ...]]]] | None:
        """The hypothesis that explains most gradients, and contradicts fewest right ones."""
        best, best_score = None, (0, 0.0, 0.0)
        wrong = {name: self.by_hand[name] for name in left}
        for hypothesis in hypotheses(backward, wrong):
            if self.work + backward.work > MAX_WORK:
                break
            if best is not None and best_score[0] == len(left) and best_score[1] == 0:
                if hypothesis.cost > -best_score[2]:
                    break
            try:
                gradients = backward.under(hypothesis.change)
            except RuntimeError:  # shapes that don't fit
                continue
            explained = {}
            for name in left:
                mistakes = self._explained(name, gradients[name], backward, hypothesis)
                if mistakes is not None:
                    explained[name] = mistakes
            if not explained or not self._is_proven(explained):
                continue
            contradicted = sum(
                not self.is_close[name](self.by_hand[name], gradients[name])
                for name in self.by_hand
                if name not in left and name not in strong
            )
            further = sum(len(before) for before, _ in explained.values())
            score = (len(explained), -float(contradicted), -hypothesis.cost - further)
            if best is None or score > best_score:
                best, best_score = (hypothesis, explained), score
        self.work += backward.work
        return best

    def _explained(
        self, name: str, gradient: Tensor, backward: Backward, hypothesis: Hypothesis
    ) -> tuple[tuple[Mistake, ...], tuple[Mistake, ...]] | None:
        """The mistakes that make a changed gradient the one by hand: before and of the change."""
        by_hand, is_close = self.by_hand[name], self.is_close[name]
        before = backward.gradient(backward.tape.inputs[name])
        if is_close(gradient, before):
            return None  # the change does not concern it
        found = relation(by_hand, gradient, self.sizes, is_close)
        if found is not None:
            if found and gradient.numel() == 1 and found[0].kind == "factor of all":
                return None  # any number is some multiple of a number
            return tuple(found), (hypothesis.mistake,)
        if hypothesis.partly is not None and by_hand.shape == gradient.shape:
            direction = gradient - before
            factor = factor_between(by_hand - before, direction, is_close)
            if factor is not None and direction.numel() > 2:
                mistake = Mistake(
                    hypothesis.partly.kind, {**hypothesis.partly.details, "factor": factor}
                )
                return (), (mistake,)
        return None

    def _is_proven(self, explained: Mapping[str, object]) -> bool:
        """Whether the gradients that agree have more than one element."""
        return any(self.right[name].numel() > 1 for name in explained) or len(explained) > 1

    def _unsummed(
        self, backward: Backward, left: Sequence[str], made: tuple[Mistake, ...]
    ) -> dict[str, tuple[Mistake, ...]]:
        """Gradients that are right in a pass but for the axes that a sum is taken over."""
        found: dict[str, tuple[Mistake, ...]] = {}
        for name in left:
            right, is_close = backward.gradient(backward.tape.inputs[name]), self.is_close[name]
            mistakes: list[Mistake] | None = None
            if made:
                mistakes = relation(self.by_hand[name], right, self.sizes, is_close)
            if mistakes is None:
                sums = of_sums(
                    self.by_hand[name], right, list(unsummed(backward, name)), is_close
                )
                mistakes = [sums] if sums else None
            if mistakes is None and made:
                term = of_parameter(self.by_hand[name], right, self.tensors[name], is_close)
                term = term or of_signs(self.by_hand[name], right, is_close)
                mistakes = [term] if term else None
            if mistakes:
                found[name] = (*mistakes, *made)
        return found

    def _pairs(self, tape: Tape, left: Sequence[str]) -> dict[str, tuple[Mistake, ...]]:
        """Two changes at once, where no single one explains anything."""
        backward = Backward(tape)
        wrong = {name: self.by_hand[name] for name in left}
        tried = [h for h in hypotheses(backward, wrong) if not h.change.forward][:40]
        for total in range(1, 2 * len(tried)):
            for first in range(max(0, total - len(tried) + 1), (total + 1) // 2):
                one, other = tried[first], tried[total - first]
                if self.work + backward.work > MAX_WORK:
                    return {}
                if one.mistake.details.get("edge", 0) == other.mistake.details.get("edge", 1):
                    continue
                try:
                    gradients = backward.under(one.change | other.change)
                except RuntimeError:
                    continue
                found: dict[str, tuple[Mistake, ...]] = {}
                for name in left:
                    mistakes = relation(
                        self.by_hand[name], gradients[name], {}, self.is_close[name]
                    )
                    if mistakes is not None and not self.is_close[name](
                        gradients[name], self.right[name]
                    ):
                        found[name] = (*mistakes, one.mistake, other.mistake)
                if found and self._is_proven(found):
                    return found
        return {}

    # -- Where it is -------------------------------------------------------------

    def placed(
        self, wrong: Sequence[str], found: Mapping[str, tuple[Mistake, ...]]
    ) -> dict[str, Diagnosis]:
        if self.tape is None:
            return {name: Diagnosis(found[name]) for name in wrong}
        layers = layers_of(self.tape)
        right = [name for name in self.by_hand if name not in wrong]
        last = max((layers[name] for name in wrong), default=0)
        above = tuple(name for name in right if layers[name] > last)
        return {
            name: Diagnosis(
                found[name],
                above,
                last,
                tuple(other for other in right if layers[other] == layers[name]),
            )
            for name in wrong
        }


def layers_of(tape: Tape) -> dict[str, int]:
    """In which layer each input is, counted from 1: a product with a matrix begins one."""
    depth = [0] * len(tape.values)
    for step in tape.steps:
        deepest = max((depth[value] for value in step.operands), default=0)
        for value in step.results:
            depth[value] = deepest + (step.name in LAYERS)
    layers = {}
    for name, number in tape.inputs.items():
        uses = real_uses(Backward(tape), number)
        layers[name] = min(
            (depth[tape.steps[edge.step].results[0]] for edge in uses), default=0
        )
    return layers


def unsummed(backward: Backward, name: str) -> Iterator[Tensor]:
    """What the gradient of an input that was broadcast is the sum of."""
    tape = backward.tape
    for edge in real_uses(backward, tape.inputs[name]):
        step, value = tape.steps[edge.step], tape.value_of(edge)
        operand, result = backward.values[value], backward.values[step.results[0]]
        gradient = backward.gradients.get(step.results[0])
        if gradient is None or operand.shape == result.shape:
            continue
        try:
            local = backward.local(edge.step, {edge: operand.expand(result.shape)})
            grads = backward.through(local, [gradient])
        except RuntimeError:
            continue
        yield grads[local.positions.index(edge.operand)]
