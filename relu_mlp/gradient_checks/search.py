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
    distribution,
    factor_between,
    in_precision,
    is_alike,
    of_parameter,
    of_signs,
    of_sums,
    relation,
    reshaped,
)
from .tape import Backward, Tape, record

Function = Callable[..., Tensor]

#: How many steps may be taken backwards: below a second for 10^4 parameters.
MAX_WORK = 8000
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


#: The mistakes that make a changed gradient the one by hand: those that come after the change on
#: the way back, and the change itself.
Mistakes = tuple[tuple[Mistake, ...], tuple[Mistake, ...]]


@dataclass(frozen=True)
class Explanation:
    """A hypothesis, and what speaks for it."""

    hypothesis: Hypothesis
    explained: Mapping[str, Mistakes]
    contradicted: int  #: how many right gradients would be wrong by it
    affected: frozenset[str]  #: the inputs whose gradients it changes

    @property
    def cost(self) -> float:
        return self.hypothesis.cost + max(len(before) for before, _ in self.explained.values())

    @property
    def score(self) -> tuple[int, int, float]:
        """The larger, the better."""
        return len(self.explained), -self.contradicted, -self.cost

    @property
    def is_partial(self) -> bool:
        """Whether only a part of the change explains a gradient."""
        return any(
            mistake != self.hypothesis.mistake
            for _, of_step in self.explained.values()
            for mistake in of_step
        )


@dataclass(frozen=True)
class Made:
    """A mistake that was found, and the inputs whose gradients it changes."""

    mistake: Mistake
    affected: frozenset[str]


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
        self.unharmed: list[str] = []  #: inputs whose gradients by hand are right
        self.shapes = {name: distribution(hand) for name, hand in by_hand.items()}

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
        columns = set()
        for number, value in enumerate(self.tape.values):
            maker = self.tape.maker.get(number)
            if value.dim() and maker is not None and self.tape.is_active[number]:
                if self.tape.steps[maker].name in VIEWS:
                    continue
                sizes.setdefault(len(value), f"{len(value)} is the number of rows")
                if value.dim() > 1:
                    columns.add(value.shape[-1])
        for n in columns:
            sizes.setdefault(n, f"{n} is the number of columns")
        for value in self.tape.values:
            for n in value.shape:
                sizes.setdefault(n, f"{n} is a size of a tensor")
        for value in self.tape.values:
            product = " * ".join(map(str, value.shape))
            sizes.setdefault(value.numel(), f"{value.numel()} = {product} is a number of elements")
        return sizes

    def run(self, wrong: Sequence[str]) -> dict[str, tuple[Mistake, ...]]:
        """The mistakes in each gradient that is wrong, the last one first."""
        self.unharmed = [name for name in self.by_hand if name not in wrong]
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
        factor = factor_between(by_hand, right, is_close)
        term = None
        if factor is None or right.numel() == 1:  # else a gradient that is a multiple of w itself
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
            return exchanged, bool(exchanged[0].details["is_mutual"])
        found = relation(by_hand, right, self.sizes, is_close)
        if found is not None:
            return tuple(found), right.numel() > 1
        signs = of_signs(by_hand, right, is_close)
        if signs:
            return (signs,), True
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
                    is_mutual = other not in self.unharmed
                    exchanged = Mistake("exchanged", {"name": other, "is_mutual": is_mutual})
                    return (exchanged, *mistakes)
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
            shared = (
                "lost" not in place and "twice" not in place and len(names) == len(self.by_hand) > 1
            )
            for name in names:
                details = {**found[name][0].details, **place, "shared": shared}
                placed[name] = (Mistake("factor of all", details),)
        return placed

    def _place_of(self, factor: float, names: Sequence[str]) -> Mapping[str, object]:
        """The operation that multiplies by a factor which was left out, or taken twice."""
        if self.tape is None:
            return {}
        backward = Backward(self.tape)
        reasons: dict[str, object] = {}
        for edge, value in self.tape.edges():
            reached = self.tape.reached[value] & set(self.by_hand)
            step = self.tape.steps[edge.step]
            if step.name in SQUARES and abs(factor) == 0.5 and set(names) <= reached:
                reasons["square"] = step.results[0]
            if reached != set(names):
                continue
            constant = slope(backward, edge)
            if constant is None or not constant.numel() or not is_constant(constant):
                continue
            size = constant.flatten()[0].item()
            if size and abs(size * factor - 1) < 1e-9 and size != 1:
                return {"lost": step.results[0], **reasons}
            if size != 1 and abs(size - factor) < 1e-9:
                return {"twice": step.results[0]}
        size = max(abs(factor), 1 / abs(factor))
        said = self.sizes.get(round(size), "")
        is_size = abs(size - round(size)) < 1e-6 and "number of" in said
        has_mean = any(step.name == "mean" for step in self.tape.steps)
        if is_size and (has_mean or size > 2.5):  # without a mean, 2 is as often something else
            reasons["size"] = said
        return reasons

    # -- What needs one ----------------------------------------------------------

    def _by_backward_passes(
        self, tape: Tape, wrong: Sequence[str], strong: dict[str, tuple[Mistake, ...]]
    ) -> dict[str, tuple[Mistake, ...]]:
        """Passes with one change each; then with one more, in the pass that explains most."""
        found: dict[str, tuple[Mistake, ...]] = {}
        right = backward = Backward(tape)
        made: list[Made] = []
        while len(made) < MAX_MISTAKES:
            for name in [name for name in wrong if name not in found]:
                of_made = tuple(each.mistake for each in made if name in each.affected)
                mistakes = self._but_for_a_sum(backward, name, bool(of_made))
                if mistakes:
                    found[name] = (*mistakes, *of_made)
            left = [name for name in wrong if name not in found]
            if not left:
                break
            best = None
            if made:  # the same mistake in the next layer first, and then any other
                best = self._best(backward, left, strong, {each.mistake.rule for each in made})
            best = best or self._best(backward, left, strong)
            if best is None and backward is not right:
                best = self._best(right, left, strong)  # without what was found elsewhere
                backward, made = (right, []) if best is not None else (backward, made)
            if best is None:
                break
            for name, (before, of_step) in best.explained.items():
                of_made = tuple(each.mistake for each in made if name in each.affected)
                found[name] = (*before, *of_step, *of_made)
            if best.contradicted or best.is_partial:
                continue  # it was made for some gradients alone
            made.insert(0, Made(best.hypothesis.mistake, best.affected))
            backward = Backward(tape, backward.known | best.hypothesis.change)
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
    ) -> Explanation | None:
        """The hypothesis that explains most gradients, and contradicts fewest right ones."""
        best: Explanation | None = None
        wrong = {name: self.by_hand[name] for name in left}
        start = backward.work
        last = max(self.layers[name] for name in left)
        in_last = {name for name in left if self.layers[name] == last}
        for hypothesis in hypotheses(backward, wrong, rules):
            if self.work + backward.work - start > MAX_WORK:
                break
            if best is not None and not best.contradicted and in_last <= set(best.explained):
                margin = 0 if len(best.explained) >= len(left) else 1
                if hypothesis.cost > best.cost + margin:
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
            explanation = Explanation(
                hypothesis,
                explained,
                sum(not self.is_close[n](self.by_hand[n], gradients[n]) for n in self.unharmed),
                frozenset(
                    name
                    for name, gradient in gradients.items()
                    if not self.is_close[name](
                        gradient, backward.gradient(backward.tape.inputs[name])
                    )
                ),
            )
            if best is None or explanation.score > best.score:
                best = explanation
        self.work += backward.work - start
        return best

    def _explained(
        self, name: str, gradient: Tensor, backward: Backward, hypothesis: Hypothesis
    ) -> Mistakes | None:
        """The mistakes that make a changed gradient the one by hand: before and of the change."""
        by_hand, is_close = self.by_hand[name], self.is_close[name]
        before = backward.gradient(backward.tape.inputs[name])
        if is_close(gradient, before):
            return None  # the change does not concern it
        found = None
        if by_hand.numel() != gradient.numel() or is_alike(self.shapes[name], gradient):
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

    def _is_proven(self, explained: Mapping[str, Mistakes]) -> bool:
        """Whether so many digits agree that it can't be by chance: of several elements, or of one
        that is no small integer."""
        return len(explained) > 1 or any(
            self.right[name].numel() > 1
            or (not before and abs(by_hand.item() - round(by_hand.item())) > 1e-6)
            for name, (before, _) in explained.items()
            for by_hand in [self.by_hand[name]]
        )

    def _but_for_a_sum(
        self, backward: Backward, name: str, is_changed: bool
    ) -> tuple[Mistake, ...]:
        """What is wrong with a gradient in a pass in which it is right but for a factor, the axes
        of a sum or a term; nothing if it is not.

        Args:
            is_changed: whether the pass has a mistake that concerns this gradient.
        """
        by_hand, is_close = self.by_hand[name], self.is_close[name]
        right = backward.gradient(backward.tape.inputs[name])
        if is_changed and right.numel() > 1:
            same = relation(by_hand, right, self.sizes, is_close)
            if same:
                return tuple(same)
        mistake = of_sums(by_hand, right, list(unsummed(backward, name)), is_close)
        if mistake is None and is_changed:
            mistake = of_parameter(by_hand, right, self.tensors[name], is_close)
            mistake = mistake or of_signs(by_hand, right, is_close)
        return (mistake,) if mistake is not None else ()

    def _pairs(self, backward: Backward, left: Sequence[str]) -> dict[str, tuple[Mistake, ...]]:
        """Two changes at once, where no single one explains anything."""
        wrong = {name: self.by_hand[name] for name in left}
        tried = [h for h in hypotheses(backward, wrong) if not h.change.forward][:MAX_PAIRED]
        before = backward.work
        for one, other in cheapest_pairs(tried):
            if backward.work - before > MAX_WORK / 4:
                break
            if one.mistake.details.get("edge", 0) == other.mistake.details.get("edge", 1):
                continue
            try:
                gradients = backward.under(one.change | other.change)
            except RuntimeError:
                continue
            found: dict[str, Mistakes] = {}
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
        layers[name] = max((depth[tape.steps[edge.step].results[0]] for edge in uses), default=0)
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
