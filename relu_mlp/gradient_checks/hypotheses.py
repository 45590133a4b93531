"""The mistakes that people make in derivations, as changes of the right backward pass.

Each function yields the hypotheses of one kind. A hypothesis does not say that the mistake was
made: it says what the gradients would be. search.py compares.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .tape import Backward, Change, Edge, OfEdge, OfForward, Slot, Step, Tape

#: Operators that only look at their operand in another way.
VIEWS = frozenset(
    [
        *("t", "permute", "transpose", "numpy_T", "view", "_unsafe_view", "reshape", "expand"),
        *("clone", "unsqueeze", "squeeze", "alias", "detach", "contiguous", "select", "slice"),
        *("unbind", "split", "lift_fresh", "_to_copy"),
    ]
)
#: Operators whose derivative by one operand takes another one.
PRODUCTS = frozenset(
    ["mm", "bmm", "matmul", "baddbmm", "mv", "addmv", "dot", "mul", "convolution", "linear"]
)
#: Products with a matrix: each begins a layer.
LAYERS = PRODUCTS - {"mul"}
#: Operators that reduce rows or columns to a statistic of them.
STATISTICS = frozenset(
    ("mean", "var", "std", "sum", "amax", "amin", "logsumexp", "var_mean", "std_mean")
)

#: Those of them that are as often something else, such as the softmax's denominator.
SUMS = frozenset(["sum", "logsumexp", "amax", "amin"])

#: At most so many values are tried in the place of another.
MAX_OTHERS = 12
#: At most so many rows are told apart.
MAX_ROWS = 64


#: What two mistakes have in common if the same is done wrong in two layers.
Rule = tuple[object, ...]


@dataclass(frozen=True)
class Mistake:
    """What is wrong, for wording.py: a kind, and the values and numbers of its sentence."""

    kind: str
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rule(self) -> Rule:
        return self.kind, self.details.get("formula")


@dataclass(frozen=True)
class Hypothesis:
    """What the gradients would be with a mistake."""

    cost: float  #: how far-fetched it is
    mistake: Mistake
    change: Change
    #: what it is if only a part of the change was made, a multiple of it to be found
    partly: Mistake | None = None


def hypotheses(
    backward: Backward, wrong: Mapping[str, Tensor], rules: Collection[Rule] | None = None
) -> Iterator[Hypothesis]:
    """The hypotheses that concern the gradients that are wrong, the cheapest first, but for those
    that take more to think of: they come later.

    Args:
        backward: the pass as far as it is understood.
        wrong: the gradients by hand that it doesn't explain, by name.
        rules: those that are asked for, if not all.
    """
    for stage in STAGES:
        found: list[Hypothesis] = []
        for of in stage:
            if rules is None or of is not of_rows or ROWS_RULE in rules:  # it takes long
                found += of(backward, wrong)
        asked = (each for each in found if rules is None or each.mistake.rule in rules)
        yield from sorted(asked, key=lambda hypothesis: hypothesis.cost)


def edges_to(backward: Backward, names: Collection[str]) -> Iterator[tuple[Edge, Step]]:
    """The edges along which a gradient flows to one of the inputs."""
    tape = backward.tape
    for edge, value in tape.edges():
        if tape.reached[value].intersection(names) and any(
            result in backward.gradients for result in tape.steps[edge.step].results
        ):
            yield edge, tape.steps[edge.step]


def slope(backward: Backward, edge: Edge) -> Tensor | None:
    """The factor of an operation that works element by element; None if it does not."""
    if edge not in backward.slopes:
        backward.slopes[edge] = _slope(backward, edge)
    return backward.slopes[edge]


def _slope(backward: Backward, edge: Edge) -> Tensor | None:
    tape = backward.tape
    local = backward.local(edge.step)
    operand = backward.values[tape.value_of(edge)]
    if len(local.results) != 1 or edge.operand not in local.positions:
        return None
    (result,) = local.results
    if result.shape != operand.shape and result.numel() != 1:
        return None
    position = local.positions.index(edge.operand)
    probe = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype, device=result.device)
    probe = probe.view_as(result)
    of_ones = backward.through(local, [torch.ones_like(result)])[position]
    of_probe = backward.through(local, [probe])[position]
    # A loss of all elements has a slope at each, times the one number that arrives.
    return of_ones if torch.allclose(of_probe, probe * of_ones, rtol=1e-12, atol=0) else None


def is_constant(tensor: Tensor) -> bool:
    return not tensor.numel() or bool((tensor == tensor.flatten()[0]).all())


def differs(left: Tensor, right: Tensor) -> bool:
    return not torch.allclose(left, right, rtol=1e-9, atol=0, equal_nan=True)


def times(factor: Tensor) -> Callable[[Tensor], Tensor]:
    """Multiplies a gradient by a factor in place of the right one."""
    return lambda gradient: gradient * factor


def positive_part_times(factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.relu() * factor


def at_edge(edge: Edge, rule: Callable[[Tensor], Tensor]) -> Change:
    """Another rule for an operation of one result."""
    return Change(edges={edge: lambda of_results, _: rule(of_results[0])})


def of_slopes(backward: Backward, names: Collection[str]) -> Iterator[Hypothesis]:
    """The derivative of an operation element by element: left out, twice, of something else."""
    tape = backward.tape
    for edge, step in edges_to(backward, names):
        right = slope(backward, edge)
        if right is None or is_constant(right):
            continue
        z_number, y_number = tape.value_of(edge), step.results[0]
        z, y = backward.values[z_number], backward.values[y_number]
        details = {"z": z_number, "y": y_number, "edge": edge}

        is_mask = len(right.unique()) == 2 and y.shape == z.shape
        yield Hypothesis(
            3,
            Mistake("slope left out", details),
            at_edge(edge, times(torch.ones_like(right))),
            Mistake("leaky", details) if is_mask else None,
        )
        if is_mask:
            low, high = right.min(), right.max()
            yield Hypothesis(
                3.5,
                Mistake("mask inverted", details),
                at_edge(edge, times(high + low - right)),
            )
            yield Hypothesis(4, Mistake("mask of the gradient", details), at_edge(edge, torch.relu))
            yield Hypothesis(
                5,
                Mistake("mask of the gradient as well", details),
                at_edge(edge, positive_part_times(right)),
            )
        for cost, formula, other in slopes_instead(z, y, right):
            if differs(other, right):
                yield Hypothesis(
                    cost,
                    Mistake("slope", {**details, "formula": formula}),
                    at_edge(edge, times(other)),
                )


def slopes_instead(z: Tensor, y: Tensor, right: Tensor) -> Iterator[tuple[float, str, Tensor]]:
    """What is taken for the slope of y = f(z), element by element."""
    yield 3.5, "its square", right**2
    yield 3.8, "2", torch.full_like(right, 2.0)
    for name, v in (("y", y), ("z", z)):
        if v.shape == right.shape:
            yield 3.6, f"{name} (1 - {name})", v * (1 - v)
            yield 3.6, f"1 - {name}²", 1 - v**2
            yield 3.7, f"1 - {name}", 1 - v
            yield 3.7, name, v
            yield 4.5, f"1 + {name}", 1 + v
            yield 4.5, f"1 + {name}²", 1 + v**2
            yield 4.5, f"1 where {name} > 0, and 0 elsewhere", (v > 0).to(v.dtype)
            yield 4.5, f"{name}²", v**2
            yield 4.5, f"the sign of {name}", v.sign()
            yield 4.5, f"the absolute value of {name}", v.abs()
            yield 4.6, f"1 / {name}", 1 / v
            yield 4.6, f"1 / {name}²", 1 / v**2
            yield 4.6, f"1 / (2 {name})", 0.5 / v
    yield 4.7, "its absolute value", right.abs()
    yield 4.7, "its sign", right.sign()
    yield 4.8, "1 / f'(z)", 1 / right
    yield 3.9, "z f'(z)", z * right
    yield 4.8, "f'(z) / z", right / z


def of_operands(backward: Backward, names: Collection[str]) -> Iterator[Hypothesis]:
    """A derivative that is taken with another value in the place of an operand."""
    tape = backward.tape
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, value in enumerate(backward.values):
        if value.is_floating_point() and value.dim():
            alike.setdefault(tuple(value.shape), []).append(number)
    steps = {edge.step: step for edge, step in edges_to(backward, names)}
    for n, step in steps.items():
        if step.name in PRODUCTS:
            positions: Sequence[int] = range(len(step.operands))
        elif len(step.operands) == 1 and not is_linear(backward, Edge(n, 0)):
            positions = [0]
        else:
            continue
        for position in positions:
            edge, operand = Edge(n, position), step.operands[position]
            if not others_are_needed(tape.is_active, step, position, names, tape.reached):
                continue
            others = alike.get(tuple(backward.values[operand].shape), [])
            nearest = sorted(others, key=lambda other: distance(backward, operand, other))
            for rank, other in enumerate(nearest[: MAX_OTHERS + 1]):
                tensor = backward.values[other]
                if other == operand or torch.equal(tensor, backward.values[operand]):
                    continue
                details = {"y": step.results[0], "operand": operand, "other": other, "edge": edge}
                kind = "operand" if len(step.operands) > 1 else "argument"
                yield Hypothesis(
                    4 + rank / 20, Mistake(kind, details), Change(operands={edge: tensor})
                )


def others_are_needed(
    is_active: Sequence[bool],
    step: Step,
    position: int,
    names: Collection[str],
    reached: Sequence[frozenset[str]],
) -> bool:
    """Whether the operand at a position can matter for the gradient of an input."""
    if len(step.operands) == 1:
        return True
    return any(
        is_active[other] and reached[other].intersection(names)
        for place, other in enumerate(step.operands)
        if place != position
    )


def is_linear(backward: Backward, edge: Edge) -> bool:
    right = slope(backward, edge)
    return right is None or is_constant(right)


def distance(backward: Backward, one: int, other: int) -> tuple[int, int]:
    """How far apart two values are: first those that make one another."""
    maker, steps = backward.tape.maker, backward.tape.steps

    def below(value: int) -> set[int]:
        near, found = {value}, set()
        for _ in range(3):
            near = set().union(*(steps[maker[v]].operands for v in near if v in maker))
            found |= near
        return found

    is_near = other in below(one) or one in below(other)
    return (0 if is_near else 1), abs(maker.get(one, -1) - maker.get(other, -1))


def of_paths(backward: Backward, names: Collection[str]) -> Iterator[Hypothesis]:
    """A value that is used in several places, and a gradient that comes from some of them."""
    tape = backward.tape

    def cut(edges: Sequence[Edge]) -> Change:
        return Change(edges=dict.fromkeys(edges, lambda _, right: torch.zeros_like(right)))

    for value, uses in tape.uses.items():
        if len(uses) < 2 or tape.reached[value].isdisjoint(names):
            continue
        last_first = sorted(uses, key=lambda edge: -edge.step)
        steps = [real_step(tape, edge) for edge in last_first]
        is_loop = len({step.name for step in steps}) == 1  # the same again and again
        kept = last_first if len(uses) <= 8 else [last_first[0], last_first[-1]]
        for edge in kept:
            place = last_first.index(edge)
            details = {
                "value": value,
                "y": steps[place].results[0],
                "count": len(uses),
                "place": len(uses) - place,
                "edge": edge,
            }
            others = [other for other in uses if other != edge]
            yield Hypothesis(4.2, Mistake("path left out", details), cut([edge]))
            if len(uses) > 2 or is_loop:
                cost = 4.1 if is_loop else 4.3
                yield Hypothesis(cost, Mistake("path alone", details), cut(others))
    for name in names:  # what the others of its products do, in a chain such as a recurrent net
        products = [
            (Edge(edge.step, place), tape.steps[edge.step])
            for edge in real_uses(tape, tape.inputs[name])
            for place in range(len(tape.steps[edge.step].operands))
            if place != edge.operand and tape.steps[edge.step].name in LAYERS
        ]
        edges = [edge for edge, _ in products if tape.is_active[tape.value_of(edge)]]
        if len(edges) > 1:
            yield Hypothesis(4.4, Mistake("chain cut", {"name": name}), cut(edges))


def of_statistics(backward: Backward, names: Collection[str]) -> Iterator[Hypothesis]:
    """Statistics of rows or columns that are taken as constants."""
    tape = backward.tape
    statistics = [
        step.results[0]
        for step in tape.steps
        if step.name in STATISTICS
        and tape.reached[step.results[0]].intersection(names)
        and backward.values[step.results[0]].numel() > 1
    ]
    zero: Callable[[Tensor], Tensor] = torch.zeros_like
    for value in statistics:
        is_mean = tape.steps[tape.maker[value]].name not in SUMS
        yield Hypothesis(
            2.8 if is_mean else 4.1,
            Mistake("constant", {"values": [value]}),
            Change(values={value: zero}),
        )
    if len(statistics) > 1:
        yield Hypothesis(
            2.9,
            Mistake("constant", {"values": statistics}),
            Change(values=dict.fromkeys(statistics, zero)),
        )


def real_step(tape: Tape, edge: Edge) -> Step:
    """The step of an edge, or the first one that makes use of what it only views."""
    step = tape.steps[edge.step]
    if step.name in VIEWS:
        for result in step.results:
            for use in real_uses(tape, result):
                return tape.steps[use.step]
    return step


def real_uses(tape: Tape, value: int) -> list[Edge]:
    """The uses of a value, beyond those that only view it."""
    found = []
    for edge in tape.uses.get(value, ()):
        step = tape.steps[edge.step]
        if step.name in VIEWS:
            for result in step.results:
                found += real_uses(tape, result)
        else:
            found.append(edge)
    return found


def of_operators(backward: Backward, names: Collection[str]) -> Iterator[Hypothesis]:
    """What is known to go wrong with certain operators."""
    for edge, step in edges_to(backward, names):
        if edge.operand:
            continue
        y = backward.values[step.results[0]]
        factor, kind = None, "diagonal"
        if step.name == "_softmax":
            factor = y * (1 - y)
        elif step.name == "_log_softmax":
            factor = 1 - y.exp()
        elif "layer_norm" in step.name or ("batch_norm" in step.name and len(step.results) > 2):
            factor, kind = slope_of_norm(backward, step, y), "statistics"
        details = {"y": step.results[0], "z": step.operands[0], "edge": edge}
        if factor is not None:
            yield Hypothesis(4, Mistake(kind, details), at_edge(edge, times(factor)))
        if step.name in ("index", "embedding"):
            indices = step.args[1] if isinstance(step.args[1], list) else [step.args[1]]
            if all(isinstance(index, Slot) for index in indices):
                places = tuple(backward.values[index.value] for index in indices)
                change = Change(edges={edge: overwriting(places)})
                yield Hypothesis(4, Mistake("places overwritten", details), change)


def slope_of_norm(backward: Backward, step: Step, y: Tensor) -> Tensor:
    """What a normalization multiplies by, if mean and variance are constants."""
    factor = backward.values[step.results[2]]  # 1 / the standard deviation
    is_of_layer = "layer" in step.name
    if not is_of_layer:
        factor = factor.view(-1, *[1] * (y.dim() - 2))
    weight = step.args[2 if is_of_layer else 1]
    if isinstance(weight, Slot):
        scale = backward.values[weight.value]
        factor = factor * (scale if is_of_layer else scale.view(factor.shape))
    return factor


def overwriting(places: tuple[Tensor, ...]) -> OfEdge:
    """The gradient of an indexed tensor, if each place gets what comes last."""

    def rule(of_results: Sequence[Tensor], right: Tensor) -> Tensor:
        return torch.zeros_like(right).index_put(places, of_results[0])

    return rule


def operand_alone(place: int, sign: int) -> OfForward:
    return lambda operands: sign * operands[place]


def applied(function: Callable[[Tensor], Tensor]) -> OfForward:
    return lambda operands: function(operands[0])


def of_forward(backward: Backward, names: Collection[str]) -> Iterator[Hypothesis]:
    """A derivation whose own forward pass lacks a term, a factor or an activation."""
    steps = {edge.step: step for edge, step in edges_to(backward, names)}
    for n, step in steps.items():
        result = backward.values[step.results[0]]
        details = {"y": step.results[0]}
        if step.name in ("add", "sub", "mul", "div") and len(step.operands) == 2:
            for place, operand in enumerate(step.operands):
                kept = 1 - place
                if backward.values[step.operands[kept]].shape != result.shape:
                    continue
                sign = -1 if step.name == "sub" and kept == 1 else 1
                yield Hypothesis(
                    4.5,
                    Mistake("term forgotten", {**details, "operand": operand}),
                    Change(forward={n: operand_alone(kept, sign)}),
                )
        elif len(step.operands) == 1 and not is_linear(backward, Edge(n, 0)):
            if backward.values[step.operands[0]].shape != result.shape:
                continue
            yield Hypothesis(
                4.5,
                Mistake("activation forgotten", {**details, "z": step.operands[0]}),
                Change(forward={n: lambda o: o[0]}),
            )
            for name, function in ACTIVATIONS.items():
                if differs(function(backward.values[step.operands[0]]), result):
                    yield Hypothesis(
                        5.5,
                        Mistake("other activation", {**details, "name": name}),
                        Change(forward={n: applied(function)}),
                    )


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def of_cross_entropies(backward: Backward, names: Collection[str]) -> Iterator[Hypothesis]:
    """Where the gradient is p - t, however the loss is written: without t, without the rest of
    the softmax's Jacobian, without the softmax."""
    for value, gradient in activations(backward, names):
        v = backward.values[value]
        details = {"value": value}

        def instead(tensor: Tensor, value: int = value) -> Change:
            return Change(values={value: lambda _: tensor})

        if v.dim() == 2 and v.shape[1] > 1:
            p = v.softmax(1)
            scale = (gradient / p).max(1, keepdim=True).values
            t = p - gradient / scale
            if (scale > 0).all() and is_one_hot(t):
                yield Hypothesis(3.9, Mistake("one-hot", details), instead(scale * p))
                yield Hypothesis(
                    3.9, Mistake("diagonal of p - t", details), instead(-scale * t * (1 - p))
                )
                yield Hypothesis(4, Mistake("only the target", details), instead(-scale * t))
                yield Hypothesis(
                    4, Mistake("softmax's derivative", details), instead(-scale * t / p)
                )
                for words, other in (
                    ("the logits themselves", v),
                    ("their sigmoid", v.sigmoid()),
                    ("their exponentials, which are not divided by their sum", v.exp()),
                    ("the softmax along axis 0, over the rows", v.softmax(0)),
                    ("the logarithm of the softmax", p.log()),
                ):
                    mistake = Mistake("p of another", {**details, "words": words})
                    yield Hypothesis(4.1, mistake, instead(scale * (other - t)))
                classes = t.round().argmax(1, keepdim=True).to(v.dtype)
                for words, other in (
                    ("the number of the class", classes.expand_as(v)),
                    ("a one-hot target for the next class", t.roll(1, 1)),
                    ("a one-hot target for the class before", t.roll(-1, 1)),
                ):
                    mistake = Mistake("t of another", {**details, "words": words})
                    yield Hypothesis(4.2, mistake, instead(scale * (p - other)))
                yield Hypothesis(
                    4.6,
                    Mistake("factor", {**details, "formula": "p (1 - p)", "p": "softmax"}),
                    instead(gradient * p * (1 - p)),
                )
        p = v.sigmoid()
        for whole in {1.0, 1 / v.numel(), 1 / len(v) if v.dim() else 1.0}:
            t = p - gradient / whole
            if torch.allclose(t, t.round(), rtol=0, atol=1e-9) and bool(
                ((t > -0.5) & (t < 1.5)).all()
            ):
                yield Hypothesis(3.9, Mistake("no target", details), instead(whole * p))
                yield Hypothesis(4, Mistake("sigmoid left out", details), instead(whole * (v - t)))
                yes, no = -t * (1 - p), (1 - t) * p
                for words, other in (
                    ("the term of the answer 1 is there alone", yes),
                    ("the term of the answer 0 is there alone", no),
                    ("the term of the answer 0 has the wrong sign", yes - no),
                    ("the term of the answer 1 has the wrong sign", no - yes),
                ):
                    mistake = Mistake("one of two terms", {**details, "words": words})
                    yield Hypothesis(4.1, mistake, instead(whole * other))


def is_one_hot(t: Tensor) -> bool:
    rounded = t.round()
    return (
        torch.allclose(t, rounded, rtol=0, atol=1e-9)
        and bool((rounded.sum(1) == 1).all())
        and bool((rounded >= 0).all())
    )


def activations(backward: Backward, names: Collection[str]) -> Iterator[tuple[int, Tensor]]:
    """The values of the forward pass that are no inputs and no views, with their gradients."""
    tape = backward.tape
    for value, gradient in backward.gradients.items():
        maker = tape.maker.get(value)
        if (
            maker is not None
            and tape.steps[maker].name not in VIEWS
            and tape.reached[value].intersection(names)
            and gradient.numel() > 1
        ):
            yield value, gradient


def of_factors(backward: Backward, names: Collection[str]) -> Iterator[Hypothesis]:
    """A factor that has no business where it is, such as the slope of an output activation that
    has cancelled."""
    for value, _ in activations(backward, names):
        v = backward.values[value]
        squashed = {"p = sigmoid": v.sigmoid(), "p = tanh": v.tanh()}
        for formula, factor in (
            ("p (1 - p)", squashed["p = sigmoid"] * (1 - squashed["p = sigmoid"])),
            ("1 - p²", 1 - squashed["p = tanh"] ** 2),
            ("v (1 - v)", v * (1 - v)),
            ("1 - v²", 1 - v**2),
            ("1 - v", 1 - v),
            ("v", v),
            ("[v > 0]", (v > 0).to(v.dtype)),
        ):
            if not is_constant(factor):
                details = {"value": value, "formula": formula}
                if formula == "p (1 - p)":
                    details["p"] = "sigmoid"
                elif formula == "1 - p²":
                    details["p"] = "tanh"
                yield Hypothesis(
                    4.7,
                    Mistake("factor", details),
                    Change(values={value: times(factor)}),
                )


def of_rows(backward: Backward, wrong: Mapping[str, Tensor]) -> Iterator[Hypothesis]:
    """Rows that are left out, counted twice, or alone in a sum.

    What each row contributes is computed for itself; so the rows are found by algebra.
    """
    tape = backward.tape
    places: dict[int, set[str]] = {}
    for name in wrong:  # where the sum over the rows is taken, and where the rows begin
        for edge in real_uses(tape, tape.inputs[name])[:1]:
            places.setdefault(tape.steps[edge.step].results[0], set()).add(name)
    if places:
        rows = {len(backward.values[v]) for v in places if backward.values[v].dim()}
        for value in sorted(backward.gradients, reverse=True):
            tensor = backward.values[value]
            if value in tape.maker and tensor.dim() and len(tensor) in rows:
                places.setdefault(value, set()).update(wrong)
                break
    for value, names in places.items():
        tensor = backward.values[value]
        count = len(tensor) if tensor.dim() else 0
        if value not in backward.gradients or not 1 < count <= MAX_ROWS:
            continue

        def counted(weights: Tensor, value: int = value, tensor: Tensor = tensor) -> Change:
            shaped = weights.view(-1, *[1] * (tensor.dim() - 1))
            return Change(values={value: lambda g: g * shaped})

        ones = torch.eye(count, dtype=tensor.dtype, device=tensor.device)
        alone = [backward.under(counted(ones[row])) for row in range(count)]
        for name in names:
            if wrong[name].shape != tape_shape(backward, name):
                continue
            parts = torch.stack([each[name].flatten() for each in alone])
            weights = row_weights(parts, wrong[name].flatten())
            if weights is not None:
                details = {"value": value, "weights": tuple(weights.tolist())}
                yield Hypothesis(4.1, Mistake("rows", details), counted(weights))


def tape_shape(backward: Backward, name: str) -> torch.Size:
    return backward.values[backward.tape.inputs[name]].shape


def row_weights(parts: Tensor, total: Tensor) -> Tensor | None:
    """How often each row was counted, from their parts (row, element) and what was handed in."""
    count = len(parts)
    scale = parts.abs().sum(0).max().item()
    if not (scale > 0 and total.isfinite().all()):
        return None
    ones = torch.ones(count, dtype=parts.dtype, device=parts.device)
    units = torch.eye(count, dtype=parts.dtype, device=parts.device)
    prefixes = torch.tril(ones.expand(count, count))
    tried = torch.cat([units, ones - units, ones + units, prefixes, ones - prefixes])
    errors = (tried @ parts - total).abs().amax(1)
    best = int(errors.argmin())
    if errors[best] <= 1e-9 * scale:
        return tried[best]
    if parts.shape[1] >= count:
        weights = torch.linalg.lstsq(parts.T.cpu(), total.cpu()[:, None]).solution[:, 0]
        rounded = weights.round().to(parts)
        if (rounded @ parts - total).abs().max() <= 1e-9 * scale and rounded.abs().max() <= 8:
            return rounded
    return None


def of_early_updates(backward: Backward, names: Collection[str]) -> Iterator[Hypothesis]:
    """A weight that a step of the training had already changed when the gradient went on."""
    tape = backward.tape
    for name, number in tape.inputs.items():
        change = {}
        for edge in real_uses(tape, number):
            step, operand = tape.steps[edge.step], backward.values[tape.value_of(edge)]
            gradient = backward.gradient(tape.value_of(edge))
            if step.name in LAYERS and gradient.shape == operand.shape:
                change[edge] = operand + gradient
        if change:
            mistake = Mistake("early update", {"name": name})
            yield Hypothesis(6, mistake, Change(operands=change), mistake)


ROWS_RULE = Mistake("rows").rule

#: What yields hypotheses, in the order in which it is asked.
STAGES: tuple[tuple[Callable[[Backward, Mapping[str, Tensor]], Iterator[Hypothesis]], ...], ...] = (
    (of_statistics, of_slopes, of_operators, of_cross_entropies),
    (of_operands, of_paths, of_rows),
    (of_forward, of_factors, of_early_updates),
)
