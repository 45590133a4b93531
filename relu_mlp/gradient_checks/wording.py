"""Sentences about mistakes: what is wrong, where, how one sees it, and what to look at."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .hypotheses import VIEWS, Mistake
from .rounding import allowed
from .search import Diagnosis
from .tape import Slot, Tape

#: How long an expression may be before its inner part becomes "...".
MAX_EXPRESSION = 44

#: The slope of y = f(z) as people write it.
SLOPES = {
    "relu": "1 where z > 0, and 0 elsewhere",
    "sigmoid": "y (1 - y)",
    "tanh": "1 - y²",
    "exp": "y",
    "log": "1 / z",
    "abs": "the sign of z",
    "square": "2 z",
    "sqrt": "1 / (2 y)",
    "sin": "cos z",
    "cos": "-sin z",
}

INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "mm": "@", "bmm": "@", "mv": "@"}
INFIX |= {"dot": "@", "matmul": "@"}
BINDING = {"+": 1, "-": 1, "*": 2, "/": 2, "@": 2}


class Expressions:
    """The values of a tape as the user would write them."""

    def __init__(self, tape: Tape | None, names: Mapping[int, str]) -> None:
        self.tape = tape
        self.names: dict[int, str] = dict(tape.names) if tape is not None else {}
        if tape is not None:
            for number, value in enumerate(tape.values):
                if number not in tape.maker and id(value) in names:
                    self.names.setdefault(number, names[id(value)])

    def operator(self, step: Any) -> str:
        """The name of an operation, as a person calls it."""
        name: str = step.name
        if name == "clamp" and is_clamp_at_0(step):
            return "relu"
        if name == "clamp_min" and 0 in step.args:
            return "relu"
        if name == "pow" and 2 in step.args:
            return "square"
        for long, short in (("native_", ""), ("_log_", "log_"), ("_softmax", "softmax")):
            name = name.replace(long, short) if name.startswith(long) else name
        return name

    def maker(self, number: int) -> str:
        """The name of the operation that makes a value."""
        assert self.tape is not None
        return self.operator(self.tape.steps[self.tape.maker[number]])

    def __call__(self, number: int) -> str:
        for depth in (8, 5, 4, 3, 2):
            text = self._written(number, depth)[0]
            if len(text) <= MAX_EXPRESSION:
                return text
        return text

    def _written(self, number: int, depth: int) -> tuple[str, int]:
        """The expression, and how tightly it binds."""
        assert self.tape is not None
        if number in self.names:
            return self.names[number], 9
        if number not in self.tape.maker:
            value = self.tape.values[number]
            return (f"{value.item():.4g}" if value.numel() == 1 else "const"), 9
        if depth == 0:
            return "...", 9
        step = self.tape.steps[self.tape.maker[number]]
        name, operands = step.name, step.operands

        def inner(operand: int, binding: int = 0, least: int = 1) -> str:
            text, own = self._written(operand, depth - least)
            return text if own >= binding else f"({text})"

        if name in ("t", "permute", "transpose", "numpy_T"):
            return f"{inner(operands[0], 9, 0)}.T", 9
        if name == "slice" or name == "select":
            return f"{inner(operands[0], 9)}[...]", 9
        if name in VIEWS:
            return self._written(operands[0], depth)
        if name in INFIX:
            sign = INFIX[name]
            binding = BINDING[sign]
            parts = [
                inner(operands[self._order(step.args, a)], binding + place)
                if isinstance(a, Slot)
                else f"{a:.4g}"
                for place, a in enumerate(step.args[:2])
            ]
            return f" {sign} ".join(parts), binding
        if name == "pow" and len(operands) == 1:
            return f"{inner(operands[0], 9)}**{step.args[1]:g}", 8
        if name == "neg":
            return f"-{inner(operands[0], 2)}", 2
        if name == "index":
            return f"{inner(operands[0], 9)}[...]", 9
        return f"{self.operator(step)}({', '.join(inner(o) for o in operands[:2])})", 9

    @staticmethod
    def _order(args: Sequence[Any], argument: Slot) -> int:
        slots = [a for a in args if isinstance(a, Slot)]
        return next(n for n, slot in enumerate(slots) if slot is argument)


def is_clamp_at_0(step: Any) -> bool:
    least = step.args[1] if len(step.args) > 1 else step.kwargs.get("min")
    most = step.args[2] if len(step.args) > 2 else step.kwargs.get("max")
    return isinstance(least, (int, float)) and least == 0 and most is None


def names_in(function: Callable[..., Any], depth: int = 3) -> dict[int, str]:
    """What a function calls the tensors that it does not get as arguments, by their id."""
    found: dict[int, str] = {}
    owner = getattr(function, "__self__", None)
    plain = inspect.unwrap(getattr(function, "__func__", function))
    if owner is not None:
        for name, value in getattr(owner, "__dict__", {}).items():
            if isinstance(value, Tensor):
                found.setdefault(id(value), name)
    try:
        seen = inspect.getclosurevars(plain)
    except (TypeError, ValueError):
        return found
    for name, value in {**seen.globals, **seen.nonlocals}.items():
        if isinstance(value, Tensor):
            found.setdefault(id(value), name)
        elif inspect.isfunction(value) or inspect.ismethod(value):
            if depth:
                for key, inner in names_in(value, depth - 1).items():
                    found.setdefault(key, inner)
        else:
            for inner_name, inner_value in getattr(value, "__dict__", {}).items():
                if isinstance(inner_value, Tensor):
                    found.setdefault(id(inner_value), inner_name)
    return found


def in_words(factor: float) -> str:
    """A factor between two gradients, if possible as a simple fraction."""
    if abs(factor + 1) < 1e-6:
        return "minus"
    if abs(factor - round(factor)) < 1e-6 * abs(factor):
        return f"{round(factor)} times"
    if abs(1 / factor - round(1 / factor)) < 1e-6 / abs(factor):
        return f"{'-' if factor < 0 else ''}1/{abs(round(1 / factor))} of"
    simple = Fraction(factor).limit_denominator(12)
    is_long = simple.denominator % 3 == 0 or simple.denominator % 7 == 0  # as a decimal fraction
    if is_long and abs(factor - simple) < 1e-6 * abs(factor):
        return f"{simple} of"
    return f"{factor:.6g} times"


def listed(words: Sequence[str], last: str = "and") -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


class Sentences:
    """What to say about a gradient by hand.

    Args:
        tape: the forward pass, if it could be recorded.
        names: what the user calls tensors that are no inputs, by their id.
        diagnoses: of all inputs whose gradients are wrong.
    """

    def __init__(
        self, tape: Tape | None, names: Mapping[int, str], diagnoses: Mapping[str, Diagnosis]
    ) -> None:
        self.written = Expressions(tape, names)
        self.tape, self.diagnoses = tape, diagnoses

    def __call__(self, name: str, by_hand: Tensor, right: Tensor, tolerance: float) -> str:
        """The finding about one input, whose gradient is wrong."""
        diagnosis = self.diagnoses[name]
        said = ""
        if by_hand.shape != right.shape:
            said = f"it has shape {tuple(by_hand.shape)} instead of {tuple(right.shape)}"
        clauses: list[str] = []
        groups = [list(group) for _, group in groupby(diagnosis.mistakes, lambda m: m.rule)]
        for first, *same in groups:
            clause = self.clause(first, name, right)
            places = [place for place in map(self.at, same) if place]
            if same:
                clause += "; the same mistake is made above it"
                clause += f", at {listed(places)}" if places else ""
            clauses.append(clause)
        if clauses:
            said += ("; " if said else "") + ". And ".join(clauses)
        elif by_hand.shape == right.shape:
            said = unexplained(by_hand, right, tolerance)
        if diagnosis.all_above and diagnosis.layer:
            above = f"({listed(shortened(diagnosis.all_above))})"
            said += f". Everything above layer {diagnosis.layer} is right {above}"
        if not clauses:
            said += self.where(name, diagnosis)
        return said

    def at(self, mistake: Mistake) -> str:
        """Where a mistake was made, if it is said of a step."""
        y = mistake.details.get("y")
        return self.written(y) if isinstance(y, int) else ""

    def where(self, name: str, diagnosis: Diagnosis) -> str:
        """Where to look for a mistake that was not found."""
        if diagnosis.beside:
            verb = "is" if len(diagnosis.beside) == 1 else "are"
            return (
                f". {listed(diagnosis.beside)} beside it {verb} right, so what arrives at this "
                f"layer is right: look at the last step, from there to {name}"
            )
        if diagnosis.all_above:
            return f", so look at what leads from there to layer {diagnosis.layer}"
        return ""

    def clause(self, mistake: Mistake, name: str, right: Tensor) -> str:
        method = mistake.kind.replace(" ", "_").replace("-", "_").replace("'", "")
        say = getattr(self, f"_{method}")
        details = dict(mistake.details)
        details.pop("edge", None)
        if mistake.kind in ABOUT_IT:
            return str(say(name=name, right=right, **details))
        return str(say(**details))

    # -- Of the gradient itself --------------------------------------------------

    def _zero(self, **_: Any) -> str:
        return "it is 0"

    def _not_finite(self, **_: Any) -> str:
        return "it is not finite"

    def _precision(self, name: str) -> str:
        return f"it is right to some digits only, as if computed in {name} precision"

    def _factor_of_all(
        self,
        factor: float,
        why: str,
        lost: int | None = None,
        twice: int | None = None,
        square: int | None = None,
        size: str = "",
        shared: bool = False,
        **_: Any,
    ) -> str:
        said = f"it is {in_words(factor)} autograd's" + (f" ({why})" if why else "")
        if lost is not None and square is not None:
            return (
                f"{said}: the factor of {self.written(lost)} is left out, or the 2 in the "
                f"derivative of the square {self.written(square)}"
            )
        if lost is not None:
            return f"{said}: the derivative of {self.written(lost)} has a factor that is left out"
        if twice is not None:
            return (
                f"{said}: the derivative of {self.written(twice)} has a factor that is in it twice"
            )
        if square is not None:
            said += f": the derivative of a square, {self.written(square)}, has a factor 2"
        if "rows" in why and abs(factor) < 1:
            said += ": look for a division by it that is too much, such as a mean in place of a sum"
        elif "rows" in why:
            said += ": look for a division by it that was lost, such as that of a mean"
        elif size and not why:
            which = "too much" if abs(factor) < 1 else "lost"
            said += f"{', or' if square is not None else ':'} a division is {which} ({size})"
        elif abs(factor + 1) < 1e-6:
            said += ": look for a difference that was taken the other way round"
        if shared:
            said += (
                "; every gradient has this factor, so it is in what all share, the derivative of "
                "the loss"
            )
        return said

    def _transposed(self, **_: Any) -> str:
        return "it is the transpose: the two factors of the product were exchanged"

    def _reshaped(self, is_sum: bool, **_: Any) -> str:
        if is_sum:
            return (
                "it is the sum over all elements of the gradient, which is the right number where "
                "there is one element: sum over the rows alone, which keeps the shape"
            )
        return "the values are right, so reshape it (keepdim=True keeps a dimension of size 1)"

    def _not_summed(self, axes: tuple[int, ...], shape: Sequence[int], **_: Any) -> str:
        return (
            f"{axes_in_words(axes)} was not summed over: an input that all rows share gets the sum "
            "of what the rows contribute"
        )

    def _summed_over(self, axes: tuple[int, ...], shape: Sequence[int], **_: Any) -> str:
        if len(axes) == len(shape):
            return "it is the sum over all elements: sum only the axes that were broadcast"
        return (
            f"the sum was taken over {axes_in_words(axes)} of the {tuple(shape)} gradient: "
            "sum over the axis along which the input was broadcast, which are the rows"
        )

    def _mean_over(
        self, axes: tuple[int, ...], shape: Sequence[int], factor: float, **_: Any
    ) -> str:
        return (
            (f"it is {in_words(factor)} autograd's: " if factor != 1 else "")
            + f"a mean was taken over {axes_in_words(axes)} of the {tuple(shape)} gradient, where "
            "the rows are to be summed"
        )

    def _sum_over_all(self, is_one: bool, **_: Any) -> str:
        return (
            "it is the sum over all elements of the gradient"
            if is_one
            else "every element is the sum over all elements of the gradient"
        ) + ": sum over the rows alone"

    def _exchanged(self, name: str, is_mutual: bool) -> str:
        if not is_mutual:
            return (
                f"it is the gradient of {name}, which is right: what this input is multiplied by "
                "is left out of its derivative, or the same gradient was returned twice"
            )
        return (
            f"it is the gradient of {name}: look at the order in which they are "
            "returned, and at which factor belongs to which"
        )

    def _decay(self, factor: float, name: str, **_: Any) -> str:
        return (
            f"it differs from autograd's by exactly {factor:.6g} times {name}: the derivative of a "
            f"regularizer such as weight decay, {abs(factor) / 2:.6g} * sum {name}², is "
            f"{'missing, or a part of it' if factor < 0 else 'in it, and not in the loss'}"
        )

    def _sparsity(self, factor: float, name: str, **_: Any) -> str:
        return (
            f"it differs from autograd's by exactly {factor:.6g} times the sign of {name}: the "
            f"derivative of {abs(factor):.6g} * sum |{name}| is "
            f"{'missing' if factor < 0 else 'in it, and not in the loss'}"
        )

    def _constant_term(self, factor: float, name: str, **_: Any) -> str:
        return (
            f"it differs from autograd's by the constant {factor:.6g} in every element: a term of "
            f"the loss that is linear in {name} is "
            f"{'missing' if factor < 0 else 'counted, and not there'}"
        )

    def _absolute_value(self, **_: Any) -> str:
        return "it is the absolute value of autograd's: the sign was lost"

    def _sign_alone(self, **_: Any) -> str:
        return "it is the sign of autograd's: the size was lost"

    def _squared(self, **_: Any) -> str:
        return "it is the square of autograd's"

    def _flipped(self, axis: int, **_: Any) -> str:
        return f"it is autograd's in reverse order along axis {axis}"

    def _rolled(self, axis: int, shift: int, **_: Any) -> str:
        return f"it is autograd's moved by {shift} along axis {axis}: an index is off by one"

    def _normalized(self, norm: float, **_: Any) -> str:
        return f"it is autograd's divided by its norm, {norm:.6g}: normalize after the check"

    def _clipped(self, limit: float, **_: Any) -> str:
        return f"it is autograd's clipped at {limit:.6g}: clip after the check"

    # -- Of a step of the derivation ---------------------------------------------

    def _slope_left_out(self, z: int, y: int) -> str:
        operator, inner = self.written.maker(y), self.written(z)
        rule = SLOPES.get(operator)
        look = f": the slope is {rule}" if rule else ""
        mask = ", which is its mask," if operator == "relu" else ""
        return (
            f"the derivative of {operator}{mask} is left out at {self.written(y)}; the gradient "
            f"passes as if it were {inner}{look}"
        )

    def _leaky(self, z: int, y: int, factor: float) -> str:
        return (
            f"the mask of {self.written.maker(y)} at {self.written(y)} lets {factor:.6g} times the "
            "gradient pass where the unit is off, as if it were a leaky one"
        )

    def _mask_inverted(self, z: int, y: int) -> str:
        return (
            f"the mask of {self.written.maker(y)} at {self.written(y)} is inverted: the gradient "
            f"must pass where {self.written(z)} > 0, and be 0 elsewhere"
        )

    def _mask_of_the_gradient(self, z: int, y: int) -> str:
        return (
            f"the mask of {self.written.maker(y)} at {self.written(y)} is taken from the sign of "
            f"the gradient that arrives: take it from {self.written(z)} > 0"
        )

    def _mask_of_the_gradient_as_well(self, z: int, y: int) -> str:
        return (
            f"where the gradient that arrives at {self.written(y)} is negative it is set to 0: the "
            f"mask of {self.written.maker(y)} is {self.written(z)} > 0, whatever the gradient is"
        )

    def _slope(self, z: int, y: int, formula: str) -> str:
        operator = self.written.maker(y)
        if formula == "its square":
            return (
                f"the derivative of {operator} at {self.written(y)} is in it twice: one "
                "factor for each application of the chain rule"
            )
        expression = self.written(y)
        rule = SLOPES.get(operator)
        if operator in ("mul", "div") and formula == "z f'(z)":
            return (
                f"the derivative of {expression} by {self.written(z)} lacks a division by "
                f"{self.written(z)}: that of 1 / z is -1 / z²"
            )
        if operator in ("mul", "div"):
            factor = self.written(z) if formula == "z" else f"{formula}, z = {self.written(z)}"
            return (
                f"the derivative of {expression} by {self.written(z)} is taken as {factor}: hold "
                "the other operand fixed and derive by this one"
            )
        if operator == "relu" and formula in ("z", "y"):
            return (
                f"the gradient is multiplied by {formula}, where the mask of relu belongs, at "
                f"{formula} = {expression if formula == 'y' else self.written(z)}: the mask "
                "selects, it is 1 or 0"
            )
        if operator == "abs" and formula == "z":
            return (
                f"the derivative of abs at {expression} is taken as z = {self.written(z)}: it is "
                "the sign of z"
            )
        right = f": it is {rule}" if rule else ""
        return (
            f"the derivative of {operator}, y = {expression} of z = {self.written(z)}, is taken "
            f"as {formula}{right}"
        )

    def _argument(self, y: int, operand: int, other: int) -> str:
        operator = self.written.maker(y)
        said = "the mask" if operator == "relu" else "the derivative"
        missing = self._term_between(operand, other)
        if missing:
            return (
                f"{said} of {operator} at {self.written(y)} is taken at {self.written(other)}: "
                f"{missing} is forgotten, and its argument is {self.written(operand)}"
            )
        return (
            f"{said} of {operator} at {self.written(y)} is taken at {self.written(other)}, in "
            f"place of its argument {self.written(operand)}"
        )

    def _term_between(self, operand: int, other: int) -> str:
        """What was added to a value, or taken from it, to make an operand; "" if nothing was."""
        assert self.tape is not None
        maker = self.tape.maker.get(operand)
        if maker is None or self.tape.steps[maker].name not in ("add", "sub"):
            return ""
        operands = self.tape.steps[maker].operands
        if len(operands) != 2 or other not in operands:
            return ""
        return self.written(operands[1 - operands.index(other)])

    def _operand(self, y: int, operand: int, other: int) -> str:
        expected, taken = self.written(operand), self.written(other)
        if taken in (f"{expected}.T", expected.removesuffix(".T")) and taken != expected:
            return (
                f"{expected.removesuffix('.T')} is transposed on the way back through "
                f"{self.written(y)}: going back, a product takes the transpose of its matrix"
            )
        return (
            f"the product {self.written(y)} is derived with {taken} in place of {expected}"
            f"{self._why(operand, other)}"
        )

    def _why(self, operand: int, other: int) -> str:
        """Whether one is the activation of the other."""
        assert self.tape is not None
        maker = self.tape.maker
        for one, what in ((operand, "pre-activation"), (other, "activation")):
            base = one
            while base in maker and self.tape.steps[maker[base]].name in VIEWS:
                base = self.tape.steps[maker[base]].operands[0]
            step = self.tape.steps[maker[base]] if base in maker else None
            rest = other if one == operand else operand
            if step is None or len(step.operands) != 1:
                continue
            if rest in self._same(step.operands[0]):
                return f", the {what} of {self.written.operator(step)}"
        return ""

    def _same(self, value: int) -> set[int]:
        """A value and its views."""
        assert self.tape is not None
        found = {value}
        for step in self.tape.steps:
            if step.name in VIEWS and found.intersection(step.operands):
                found.update(step.results)
        return found

    def _path_left_out(self, value: int, y: int, count: int, place: int) -> str:
        return (
            f"{self.written(value)} is used in {count} places, and what comes back from the "
            f"{ordinal(place, count)}, {self.written(y)}, is left out: the gradients of all paths "
            "add up"
        )

    def _path_alone(self, value: int, y: int, count: int, place: int) -> str:
        which = ordinal(place, count)
        return (
            f"{self.written(value)} is used in {count} places, and only what comes back from the "
            f"{which} use, {self.written(y)}, is in it: a loop that assigns (=) where it must "
            "add (+=), or stops after one step"
        )

    def _constant(self, values: Sequence[int]) -> str:
        what = listed([self.written(value) for value in values])
        if len(values) == 1:
            return (
                f"{what} is taken as a constant: it depends on every element that it is made of, "
                "and what comes back from it is missing"
            )
        return (
            f"{what} are taken as constants: they depend on every element that they are made of, "
            "and what comes back from them is missing"
        )

    def _statistics(self, z: int, y: int) -> str:
        return (
            f"the mean and the variance in {self.written.maker(y)} are taken as constants: they "
            f"depend on {self.written(z)}, and their gradients are missing"
        )

    def _chain_cut(self, name: str) -> str:
        return (
            f"what the products with {name} are taken of counts as a constant: only the last step "
            "of the chain is derived, and the gradient does not go back to the steps before"
        )

    def _diagonal(self, z: int, y: int) -> str:
        return (
            f"of the Jacobian of softmax at {self.written(z)} only the diagonal is there, "
            "p (1 - p): each p of a row depends on all elements of the row, so the terms -p_k p_i "
            "belong to it"
        )

    def _diagonal_of_p___t(self, value: int) -> str:
        return (
            f"of the Jacobian of softmax at {self.written(value)} only the diagonal is there, so "
            "it is -t (1 - p): the sum over the row makes p - t of it, also where t is 0"
        )

    def _one_hot(self, value: int) -> str:
        return (
            f"the one-hot target is missing at {self.written(value)}: softmax with cross entropy "
            "has the gradient p - t, and this is p alone"
        )

    def _only_the_target(self, value: int) -> str:
        return (
            f"at {self.written(value)} it is -t alone: softmax with cross entropy has the gradient "
            "p - t, with p the softmax"
        )

    def _p_of_another(self, value: int, words: str) -> str:
        return (
            f"the softmax is left out at {self.written(value)}: softmax with cross entropy has the "
            f"gradient p - t with p the softmax of the logits, and p is {words} here"
        )

    def _t_of_another(self, value: int, words: str) -> str:
        return (
            f"the target is wrong at {self.written(value)}: softmax with cross entropy has the "
            f"gradient p - t with t one-hot, and t is {words} here"
        )

    def _softmaxs_derivative(self, value: int) -> str:
        return (
            f"it is -t / p at {self.written(value)}, the derivative by the probabilities: that of "
            "the softmax is left out, which makes p - t of it"
        )

    def _one_of_two_terms(self, value: int, words: str) -> str:
        return (
            f"{words} at {self.written(value)}: binary cross entropy is the sum of two terms, "
            "t log p and (1 - t) log(1 - p), and with the sigmoid its gradient is p - t"
        )

    def _no_target(self, value: int) -> str:
        return (
            f"the target is missing at {self.written(value)}: sigmoid with binary cross entropy "
            "has the gradient p - t, and this is p alone"
        )

    def _sigmoid_left_out(self, value: int) -> str:
        return (
            f"the sigmoid is left out at {self.written(value)}: the gradient is p - t with p the "
            "sigmoid of the logits"
        )

    def _factor(self, value: int, formula: str, p: str = "") -> str:
        v = self.written(value)
        of = f" with p = {p}({v})" if p else f" with v = {v}"
        look = ": this slope has already cancelled in the derivative of the loss" if p else ""
        return f"there is a factor {formula} too much{of}{look}"

    def _places_overwritten(self, z: int, y: int) -> str:
        return (
            f"{self.written(z)} is taken at some index more than once, and each time its gradient "
            "is overwritten: accumulate with +=, that is with index_add_"
        )

    def _term_forgotten(self, y: int, operand: int) -> str:
        return (
            f"{self.written(operand)} is forgotten in the forward pass of the derivation: all "
            f"agrees if {self.written(y)} is computed without it"
        )

    def _activation_forgotten(self, y: int, z: int) -> str:
        return (
            f"{self.written.maker(y)} is left out in the forward pass of the derivation: all "
            f"agrees if {self.written(z)} goes on in place of {self.written(y)}"
        )

    def _other_activation(self, y: int, name: str) -> str:
        return (
            f"the forward pass of the derivation has {name} where the function has "
            f"{self.written.maker(y)}, at {self.written(y)}"
        )

    def _rows(self, value: int, weights: Sequence[float]) -> str:
        count = len(weights)
        missing = [n for n, w in enumerate(weights) if w == 0]
        twice = [n for n, w in enumerate(weights) if w == 2]
        others = [n for n, w in enumerate(weights) if w not in (0, 1, 2)]
        at = f" at {self.written(value)}"
        if count - len(missing) == 1 and not twice and not others:
            (only,) = (n for n, w in enumerate(weights) if w)
            return (
                f"only row {only} of {count}{at} is in it: a loop that assigns (=) where it must "
                "add (+=)"
            )
        said = []
        if missing:
            said.append(f"{rows_in_words(missing)} of {count}{at} {are(missing)} left out")
        if twice:
            said.append(f"{rows_in_words(twice)} of {count}{at} {are(twice)} counted twice")
        if others:
            said.append(f"{rows_in_words(others)}{at} counted {weights[others[0]]:g} times")
        return listed(said) + ": look at the bounds of the loop or slice over the rows"

    def _early_update(self, name: str, factor: float = 0.0) -> str:
        return (
            f"it goes back through {name} as it is after an update, {name} - {-factor:.6g} * its "
            f"gradient: compute all gradients first, then update {name}"
        )


#: The kinds whose sentences are about the gradient itself, and not about a step.
ABOUT_IT = frozenset(
    (
        "zero",
        "not finite",
        "factor of all",
        "transposed",
        "reshaped",
        "not summed",
        "summed over",
        "mean over",
        "sum over all",
        "decay",
        "sparsity",
        "constant term",
        "absolute value",
        "sign alone",
        "squared",
        "flipped",
        "rolled",
        "normalized",
        "clipped",
    )
)


def ordinal(place: int, count: int) -> str:
    if place in (1, count):
        return "first" if place == 1 else "last"
    return {2: "second", 3: "third"}.get(place, f"{place}th")


def shortened(names: Sequence[str]) -> list[str]:
    return list(names) if len(names) <= 4 else [*names[:3], "others"]


def are(rows: Sequence[int]) -> str:
    return "is" if len(rows) == 1 else "are"


def rows_in_words(rows: Sequence[int]) -> str:
    if len(rows) == 1:
        return f"row {rows[0]}"
    if len(rows) > 2 and list(rows) == list(range(rows[0], rows[-1] + 1)):
        return f"rows {rows[0]} to {rows[-1]}"
    shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    return f"rows {shown}"


def axes_in_words(axes: tuple[int, ...]) -> str:
    if axes == (0,):
        return "axis 0, the rows,"
    return f"axis {axes[0]}" if len(axes) == 1 else f"the axes {listed([str(a) for a in axes])}"


def unexplained(by_hand: Tensor, right: Tensor, tolerance: float) -> str:
    """What is seen of a mistake that was not found: how many elements, and where."""
    error = (by_hand - right).abs()
    if right.numel() == 1:
        return (
            f"it is {by_hand.item():.8g} instead of {right.item():.8g}; a single element can't "
            "tell a factor from another mistake"
        )
    if error.max() < 2.0**-16 * right.abs().max():
        at = int(error.argmax())
        return (
            f"it is right to some digits only (the largest error is {error.flatten()[at]:.2g}): "
            "a small term is missing, or something was rounded on the way"
        )
    return where_it_is_wrong(error > allowed(right, tolerance))


def where_it_is_wrong(is_wrong: Tensor) -> str:
    """How many elements are wrong, and in which rows or columns, unless these are all."""
    said = f"{int(is_wrong.sum())} of {is_wrong.numel()} elements are wrong"
    if is_wrong.dim() == 1:
        return f"{said}{_named('index', 'indices', is_wrong)}"
    if is_wrong.dim() == 2:
        rows, columns = is_wrong.any(1), is_wrong.any(0)
        said += _named("row", "rows", rows) + _named("column", "columns", columns)
    return said


def _named(singular: str, plural: str, is_wrong: Tensor) -> str:
    places = torch.nonzero(is_wrong).flatten().tolist()
    if len(places) == len(is_wrong):
        return ""
    shown = ", ".join(map(str, places[:5])) + (", ..." if len(places) > 5 else "")
    return f", all in {singular if len(places) == 1 else plural} {shown}"
