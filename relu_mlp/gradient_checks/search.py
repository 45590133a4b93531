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
    Rule,
    hypotheses,
    is_constant,
    real_uses,
    slope,
)
from .relations import (
    Closeness,
    factor_between,
    in_precision,
    of_parameter,
    of_signs,
    of_sums,
    relation,
    reshaped,
)
from .tape import Backward, Tape, record

Function = Callable[..., Tensor]

#: How many steps may be taken backwards: below a second for 10^4 parameters.
MAX_WORK = 5000
#: A tape with more numbers than this is not searched.
MAX_NUMBERS = 2_000_000
#: How many mistakes are found one after the other, each in the pass with those before.
MAX_MISTAKES = 16
#: How many hypotheses are tried two at a time.
MAX_PAIRED = 60
#: Operators that square, or sum squares.
SQUARES = ("pow", "square", "mse_loss")


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
    try:
        search = _Search(function, tensors, by_hand, right, tolerances)
        return search.placed(wrong, search.run(wrong)), search.tape
    except (RuntimeError, NotImplementedError):
        # Nobody knows what a function of somebody's does. What is wrong is wrong all the same.
        return {name: Diagnosis(()) for name in wrong}, None


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
        self.layers = {} if self.tape is None else layers_of(self.tape)
        self.work = 0.0

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
            maker = self.tape.maker.get(number)
            if value.dim() and maker is not None and self.tape.is_active[number]:
                if self.tape.steps[maker].name in VIEWS:
                    continue
                sizes.setdefault(len(value), f"{len(value)} is the number of rows")
        for value in self.tape.values:
            for n in value.shape:
                sizes.setdefault(n, f"{n} is a size of a tensor")
        for value in self.tape.values:
            product = " * ".join(map(str, value.shape))
            sizes.setdefault(value.numel(), f"{value.numel()} = {product} is a number of elements")
        return sizes

    def run(self, wrong: Sequence[str]) -> dict[str, tuple[Mistake, ...]]:
        """The mistakes in each gradient that is wrong, the last one first."""
        found: dict[str, tuple[Mistake, ...]] = {}
        weak: dict[str, tuple[Mistake, ...]] = {}
        for name in wrong:
            mistakes, is_strong = self._at_once(name)
            if mistakes:
                (found if is_strong else weak)[name] = mistakes
        for name in wrong:  # a single element can't tell a factor, but it can share that of others
            for mistakes in found.copy().values():
                if name not in found and mistakes[0].kind == "factor of all":
                    factor = mistakes[0].details["factor"]
                    if self.is_close[name](self.by_hand[name], factor * self.right[name]):
                        found[name] = mistakes
        left = [name for name in wrong if name not in found]
        if left and self.tape is not None:
            found |= self._by_backward_passes(self.tape, left, found)
        found = {name: found.get(name, weak.get(name, ())) for name in wrong}
        return self._with_places(found)

    # -- What needs no backward pass ---------------------------------------------

    def _at_once(self, name: str) -> tuple[tuple[Mistake, ...], bool]:
        """What is seen from the gradients alone, and whether it needs no other support."""
        by_hand, right, is_close = self.by_hand[name], self.right[name], self.is_close[name]
        if not right.isfinite().all():
            return (), True
        if not by_hand.isfinite().all():
            return (Mistake("not finite"),), True
        if by_hand.shape == right.shape and is_close(by_hand, torch.zeros_like(by_hand)):
            return (Mistake("zero"),), True
        precision = in_precision(by_hand, right)
        if precision:
            return (Mistake("precision", {"name": precision}),), True
        term = of_parameter(by_hand, right, self.tensors[name], is_close)
        if term is not None and self._may_be_a_term(name, term):
            return (term,), True
        for shaped, mistakes in reshaped(by_hand, right, is_close):
            if is_close(shaped, right):
                return tuple(mistakes), True
        sums = of_sums(by_hand, right, (), is_close)
        if sums:
            return (sums,), True
        exchanged = self._exchanged(name)
        if exchanged:
            return exchanged, True
        found = relation(by_hand, right, self.sizes, is_close)
        if found is not None:
            return tuple(found), right.numel() > 1
        signs = of_signs(by_hand, right, is_close)
        if signs:
            return (signs,), True
        factor = factor_between(by_hand, right, is_close)
        if factor is not None and right.numel() > 1:
            return (Mistake("factor of all", {"factor": factor, "why": ""}),), right.numel() > 2
        return ((term,) if term else ()), False

    def _may_be_a_term(self, name: str, term: Mistake) -> bool:
        """Whether the loss has a term of its own for an input, if one is said to be missing."""
        if self.tape is None or term.details["factor"] > 0:
            return True
        return len(real_uses(self.tape, self.tape.inputs[name])) > 1

    def _exchanged(self, name: str) -> tuple[Mistake, ...]:
        """Whether it is the gradient of another input."""
        for other, gradient in self.right.items():
            is_close = self.is_close[other]
            if other == name or gradient.numel() < 2 or is_close.is_small(gradient):
                continue
            for shaped, mistakes in reshaped(self.by_hand[name], gradient, is_close):
                if is_close(shaped, gradient):
                    return (Mistake("exchanged", {"name": other}), *mistakes)
        return ()

    def _with_places(
        self, found: Mapping[str, tuple[Mistake, ...]]
    ) -> dict[str, tuple[Mistake, ...]]:
        """Adds to each factor where in the function it is."""
        placed = dict(found)
        factors: dict[float, list[str]] = {}
        for name, mistakes in found.items():
            if len(mistakes) == 1 and mistakes[0].kind == "factor of all":
                factors.setdefault(float(f"{mistakes[0].details['factor']:.9g}"), []).append(name)
        for factor, names in factors.items():
            place = self._place_of(factor, names)
            shared = not place and len(names) == len(self.by_hand) > 1
            for name in names:
                details = {**found[name][0].details, **place, "shared": shared}
                placed[name] = (Mistake("factor of all", details),)
        return placed

    def _place_of(self, factor: float, names: Sequence[str]) -> Mapping[str, object]:
        """The operation that multiplies by a factor which was left out, or taken twice."""
        if self.tape is None:
            return {}
        backward = Backward(self.tape)
        squares = {}
        for edge, value in self.tape.edges():
            if self.tape.reached[value] & set(self.by_hand) != set(names):
                continue
            step = self.tape.steps[edge.step]
            constant = slope(backward, edge)
            if step.name in SQUARES and abs(factor) in (0.5, 2.0):
                squares = {"square": step.results[0]}
            if constant is None or not constant.numel() or not is_constant(constant):
                continue
            size = constant.flatten()[0].item()
            if size and abs(size * factor - 1) < 1e-9 and size != 1:
                return {"lost": step.results[0], **squares}
            if size != 1 and abs(size - factor) < 1e-9:
                return {"twice": step.results[0]}
        return squares

    # -- What needs one ----------------------------------------------------------

    def _by_backward_passes(
        self, tape: Tape, wrong: Sequence[str], strong: dict[str, tuple[Mistake, ...]]
    ) -> dict[str, tuple[Mistake, ...]]:
        """Passes with one change each; then with one more, in the pass that explains most."""
        found: dict[str, tuple[Mistake, ...]] = {}
        right = backward = Backward(tape)
        made: tuple[Mistake, ...] = ()
        for _ in range(MAX_MISTAKES):
            best = None
            # The same mistake in the next layer first, and then any other.
            for rules in (*([{m.rule for m in made}] if made else []), None):
                for each in (right, backward) if made else (right,):
                    of_made = made if each is backward else ()
                    left = [name for name in wrong if name not in found]
                    found |= self._unsummed(each, left, of_made)
                    left = [name for name in left if name not in found]
                    best = self._best(each, left, strong, rules) if left else None
                    if best is not None:
                        break
                if best is not None:
                    break
            if best is None:
                break
            hypothesis, explained = best
            for name, mistakes in explained.items():
                found[name] = (*mistakes[0], *mistakes[1], *of_made)
            backward = Backward(tape, each.known | hypothesis.change)
            made = (hypothesis.mistake, *of_made)
        left = [name for name in wrong if name not in found]
        if left and not found:
            found |= self._pairs(right, left)
        return found

    def _best(
        self,
        backward: Backward,
        left: Sequence[str],
        strong: Mapping[str, tuple[Mistake, ...]],
        rules: set[Rule] | None = None,
    ) -> tuple[Hypothesis, dict[str, tuple[tuple[Mistake, ...], tuple[Mistake, ...]]]] | None:
        """The hypothesis that explains most gradients, and contradicts fewest right ones."""
        best, best_score = None, (0, 0.0, 0.0)
        wrong = {name: self.by_hand[name] for name in left}
        before = backward.work
        last = max(self.layers[name] for name in left)
        for hypothesis in hypotheses(backward, wrong, rules):
            if self.work + backward.work - before > MAX_WORK:
                break
            if best is not None and not best_score[1]:
                in_last = {name for name in left if self.layers[name] == last}
                explains_last = in_last <= set(best[1])
                margin = 0 if len(best[1]) >= len(left) else 1
                if explains_last and hypothesis.cost > best[0].cost + margin:
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
            for name in strong:  # a change that makes this one too says more than a part alone
                mistakes = self._explained(name, gradients[name], backward, hypothesis)
                if mistakes is not None and not mistakes[0]:
                    explained[name] = mistakes
            contradicted = sum(
                not self.is_close[name](self.by_hand[name], gradients[name])
                for name in self.by_hand
                if name not in left and name not in strong
            )
            further = sum(len(before) for before, _ in explained.values())
            score = (len(explained), -float(contradicted), -hypothesis.cost - further)
            if best is None or score > best_score:
                best, best_score = (hypothesis, explained), score
        self.work += backward.work - before
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

    def _is_proven(
        self, explained: Mapping[str, tuple[tuple[Mistake, ...], tuple[Mistake, ...]]]
    ) -> bool:
        """Whether so many digits agree that it can't be by chance: of several elements, or of one
        that is no small integer."""
        return len(explained) > 1 or any(
            self.right[name].numel() > 1
            or (not before and abs(by_hand.item() - round(by_hand.item())) > 1e-6)
            for name, (before, _) in explained.items()
            for by_hand in [self.by_hand[name]]
        )

    def _unsummed(
        self, backward: Backward, left: Sequence[str], made: tuple[Mistake, ...]
    ) -> dict[str, tuple[Mistake, ...]]:
        """Gradients that are right in a pass, but for a factor or the axes of a sum."""
        found: dict[str, tuple[Mistake, ...]] = {}
        for name in left:
            by_hand, is_close = self.by_hand[name], self.is_close[name]
            right = backward.gradient(backward.tape.inputs[name])
            if made and is_close(right, self.right[name]):
                continue  # what was found does not concern it
            if made and right.numel() > 1:
                same = relation(by_hand, right, self.sizes, is_close)
                if same is not None:
                    found[name] = (*same, *made)
                    continue
            mistake = of_sums(by_hand, right, list(unsummed(backward, name)), is_close)
            if mistake is None and made:
                mistake = of_parameter(by_hand, right, self.tensors[name], is_close)
                mistake = mistake or of_signs(by_hand, right, is_close)
            if mistake is not None:
                found[name] = (mistake, *made)
        return found

    def _pairs(self, backward: Backward, left: Sequence[str]) -> dict[str, tuple[Mistake, ...]]:
        """Two changes at once, where no single one explains anything."""
        wrong = {name: self.by_hand[name] for name in left}
        tried = [h for h in hypotheses(backward, wrong) if not h.change.forward][:MAX_PAIRED]
        before = backward.work
        for one, other in cheapest_pairs(tried):
            if backward.work - before > MAX_WORK / 2:
                break
            if one.mistake.details.get("edge", 0) == other.mistake.details.get("edge", 1):
                continue
            try:
                gradients = backward.under(one.change | other.change)
            except RuntimeError:
                continue
            found: dict[str, tuple[tuple[Mistake, ...], tuple[Mistake, ...]]] = {}
            for name in left:
                mistakes = self._explained(name, gradients[name], backward, one)
                if mistakes is not None and not mistakes[0]:
                    found[name] = mistakes
            if found and self._is_proven(found):
                return dict.fromkeys(found, (one.mistake, other.mistake))
        return {}

    # -- Where it is -------------------------------------------------------------

    def placed(
        self, wrong: Sequence[str], found: Mapping[str, tuple[Mistake, ...]]
    ) -> dict[str, Diagnosis]:
        if self.tape is None:
            return {name: Diagnosis(found[name]) for name in wrong}
        layers = self.layers
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


def cheapest_pairs(tried: Sequence[Hypothesis]) -> Iterator[tuple[Hypothesis, Hypothesis]]:
    """All pairs, by the sum of their places."""
    for total in range(1, 2 * len(tried) - 2):
        for first in range(max(0, total - len(tried) + 1), (total + 1) // 2):
            yield tried[first], tried[total - first]


def layers_of(tape: Tape) -> dict[str, int]:
    """In which layer each input is, counted from 1: a product with a matrix begins one."""
    depth = [0] * len(tape.values)
    for step in tape.steps:
        deepest = max((depth[value] for value in step.operands), default=0)
        for value in step.results:
            depth[value] = deepest + (step.name in LAYERS)
    layers = {}
    for name, number in tape.inputs.items():
        uses = real_uses(tape, number)
        layers[name] = min((depth[tape.steps[edge.step].results[0]] for edge in uses), default=0)
    return layers


def unsummed(backward: Backward, name: str) -> Iterator[Tensor]:
    """What the gradient of an input that was broadcast is the sum of."""
    tape = backward.tape
    for edge in real_uses(tape, tape.inputs[name]):
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
