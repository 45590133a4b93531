"""The forward pass as a list of operations, and backward passes over it, right and changed.

A wrong derivation is, as a rule, a right one in which one rule was replaced by another. So the
search for the mistake runs the right backward pass with one rule replaced, and compares. The
operations are recorded below autograd; each is differentiated by autograd, on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch_private import TorchDispatchMode, schema_of_overload

Function = Callable[..., Tensor]

#: More operations are not recorded: a search over them would take long.
MAX_STEPS = 1000


class Slot(NamedTuple):
    """Stands for a value of the tape among the arguments of an operation."""

    value: int


class Edge(NamedTuple):
    """The way of a gradient from the results of a step to one of its operands."""

    step: int
    operand: int  #: the position among the step's operands


@dataclass(frozen=True)
class Step:
    """One operation: its arguments with slots for tensors, and its operands and results."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[int, ...]  #: the values in the slots, in their order
    results: tuple[int, ...]
    is_in_place: bool = False  #: it writes to its first operand

    @property
    def name(self) -> str:
        """The operator's name in PyTorch: `add` for aten.add.Tensor."""
        schema = schema_of_overload(self.operator)
        name = str(schema.name).split("::")[-1] if schema is not None else str(self.operator)
        return name.removesuffix("_") if self.is_in_place else name

    @property
    def is_of_pytorch(self) -> bool:
        """Whether PyTorch itself knows the derivative, and not somebody's extension."""
        schema = schema_of_overload(self.operator)
        return schema is not None and schema.name.startswith(("aten::", "prims::"))

    def __call__(self, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
        given = iter(operands)

        def filled(argument: Any) -> Any:
            if isinstance(argument, Slot):
                return next(given)
            if isinstance(argument, (list, tuple)):
                return type(argument)(map(filled, argument))
            return argument

        args = [filled(argument) for argument in self.args]
        kwargs = {name: filled(argument) for name, argument in self.kwargs.items()}
        if self.is_in_place:
            args[0] = args[0].clone()
        return tensors_in(self.operator(*args, **kwargs))


def tensors_in(result: Any) -> tuple[Tensor, ...]:
    """The tensors that an operator returned."""
    listed = result if isinstance(result, (tuple, list)) else (result,)
    return tuple(each for each in listed if isinstance(each, Tensor))


class Unrecorded(Exception):
    """The function does what a tape can't hold, such as writing to a tensor."""


def _mse_loss(y: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    square = (y - target).pow(2)
    return square if reduction == 0 else square.mean() if reduction == 1 else square.sum()


#: Operators that are recorded as the steps that people take.
DECOMPOSED: Mapping[str, Callable[..., Tensor]] = {
    "aten::addmm": lambda bias, left, right: torch.mm(left, right) + bias,
    "aten::mse_loss": _mse_loss,
    # What functionalize makes of a write; it has no derivative.
    "aten::copy": lambda target, source, *_: source.expand_as(target).clone(),
}


class _Recorder(TorchDispatchMode):
    """Writes down the operations that are called."""

    def __init__(self, inputs: Sequence[Tensor], is_active: Sequence[bool]) -> None:
        super().__init__()
        self.values: list[Tensor] = list(inputs)
        self.numbers = {id(tensor): n for n, tensor in enumerate(inputs)}
        self.active = {n for n, active in enumerate(is_active) if active}
        self.viewed: set[int] = set()  #: storages of which there are views
        self.kept: list[Tensor] = list(inputs)  #: alive, so that their ids stay their own
        self.steps: list[Step] = []

    def number(self, tensor: Tensor) -> int:
        if id(tensor) not in self.numbers:
            self.new(tensor)
        return self.numbers[id(tensor)]

    def new(self, tensor: Tensor) -> int:
        self.numbers[id(tensor)] = len(self.values)
        self.values.append(tensor)
        self.kept.append(tensor)
        return self.numbers[id(tensor)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        schema = schema_of_overload(func)
        if schema is None or len(self.steps) == MAX_STEPS:
            raise Unrecorded(str(func))
        if schema.name in DECOMPOSED and not kwargs:
            with self:
                return DECOMPOSED[schema.name](*args)
        operands: list[int] = []

        def slotted(argument: Any) -> Any:
            if isinstance(argument, Tensor):
                operands.append(self.number(argument))
                return Slot(operands[-1])
            if isinstance(argument, (list, tuple)):
                return type(argument)(map(slotted, argument))
            return argument

        slots = tuple(map(slotted, args))
        named = {name: slotted(argument) for name, argument in (kwargs or {}).items()}
        is_active = not self.active.isdisjoint(operands)
        if schema.is_mutable:
            if not is_active:
                return func(*args, **(kwargs or {}))  # it makes a constant
            self.check_write(schema, args)
            self.values[operands[0]] = args[0].clone()
        result = func(*args, **(kwargs or {}))
        if schema.is_mutable:
            outputs: tuple[int, ...] = (self.new(result),)
        else:
            outputs = tuple(  # an operator may return its operand, which is another value then
                self.new(each) if self.numbers.get(id(each)) in operands else self.number(each)
                for each in tensors_in(result)
            )
            storages = {each.untyped_storage().data_ptr() for each in tensors_in(args)}
            made = {each.untyped_storage().data_ptr() for each in tensors_in(result)}
            self.viewed |= made & storages
        if is_active:
            self.active.update(outputs)
        self.steps.append(Step(func, slots, named, tuple(operands), outputs, schema.is_mutable))
        return result

    def check_write(self, schema: Any, args: tuple[Any, ...]) -> None:
        """Raises unless an operation in place is one out of place, but for where it writes."""
        is_in_place = schema.name.endswith("_") and len(schema.returns) == 1
        written = args[0] if args else None
        if not (is_in_place and isinstance(written, Tensor)):
            raise Unrecorded(schema.name)
        if written.untyped_storage().data_ptr() in self.viewed:
            raise Unrecorded(f"{schema.name} of a view")


@dataclass
class Tape:
    """The operations of a function from its inputs to the number that it returns."""

    inputs: dict[str, int]  #: the values of the inputs that have a gradient
    values: list[Tensor]
    steps: list[Step]
    result: int
    names: dict[int, str] = field(default_factory=dict)  #: what the user calls a value

    def __post_init__(self) -> None:
        #: whether a value depends on an input that has a gradient
        self.is_active = [False] * len(self.values)
        for value in self.inputs.values():
            self.is_active[value] = True
        for step in self.steps:
            if any(self.is_active[value] for value in step.operands):
                for value in step.results:
                    self.is_active[value] = self.values[value].is_floating_point()
        self.maker = {v: n for n, step in enumerate(self.steps) for v in step.results}
        self.uses: dict[int, list[Edge]] = {}
        for edge, value in self.edges():
            self.uses.setdefault(value, []).append(edge)
        self.reached: list[frozenset[str]] = [frozenset()] * len(self.values)
        for name, value in self.inputs.items():
            self.reached[value] = frozenset([name])
        for step in self.steps:
            below = frozenset().union(*(self.reached[value] for value in step.operands))
            for value in step.results:
                self.reached[value] = below if self.is_active[value] else frozenset()

    def edges(self) -> Iterator[tuple[Edge, int]]:
        """All edges along which a gradient flows, with the values that they lead to."""
        for n, step in enumerate(self.steps):
            if any(self.is_active[value] for value in step.results):
                for position, value in enumerate(step.operands):
                    if self.is_active[value]:
                        yield Edge(n, position), value

    def value_of(self, edge: Edge) -> int:
        return self.steps[edge.step].operands[edge.operand]


def record(
    function: Function, tensors: Mapping[str, Tensor], checked: Sequence[str]
) -> Tape | None:
    """The tape of a function at the given inputs; None if it can't be recorded."""
    for functionalized in (False, True):  # the other way if the function writes to views
        copies = [tensor.clone() for tensor in tensors.values()]
        recorder = _Recorder(copies, [name in checked for name in tensors])
        try:
            with torch.no_grad(), recorder:
                called = torch.func.functionalize(function) if functionalized else function
                loss = called(*copies)
        except Exception:  # among them Unrecorded, and what functionalize rejects
            continue
        if not isinstance(loss, Tensor) or id(loss) not in recorder.numbers:
            continue
        inputs = {name: n for n, name in enumerate(tensors) if name in checked}
        return Tape(
            inputs,
            recorder.values,
            recorder.steps,
            recorder.numbers[id(loss)],
            dict(enumerate(tensors)),
        )
    return None


#: Changes the gradient of a value: from the right one to the one of a mistake.
OfValue = Callable[[Tensor], Tensor]
#: The same for an edge: from the gradients of the step's results, and what the right rule makes
#: of them.
OfEdge = Callable[[Sequence[Tensor], Tensor], Tensor]
#: Another value in the forward pass: from the operands of its step.
OfForward = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Change:
    """What a derivation does otherwise than the right one."""

    values: Mapping[int, OfValue] = field(default_factory=dict)
    edges: Mapping[Edge, OfEdge] = field(default_factory=dict)
    forward: Mapping[int, OfForward] = field(default_factory=dict)
    #: other operands that a step's derivative is taken at
    operands: Mapping[Edge, Tensor] = field(default_factory=dict)

    def __or__(self, other: Change) -> Change:
        """Both. Where both change the same, that of the other holds."""
        return Change(
            {**self.values, **other.values},
            {**self.edges, **other.edges},
            {**self.forward, **other.forward},
            {**self.operands, **other.operands},
        )


class Local(NamedTuple):
    """The graph of one step alone."""

    leaves: list[Tensor]  #: the operands along which a gradient flows
    positions: list[int]  #: their positions among the operands
    results: list[Tensor]  #: those that have a gradient
    numbers: list[int]  #: their values


class Backward:
    """Backward passes over a tape: one with the mistakes that are known, and others with more.

    Args:
        known: what the derivation is already known to do otherwise; nothing for a right pass.
    """

    def __init__(self, tape: Tape, known: Change = Change()) -> None:
        self.tape, self.known = tape, known
        self.values = forward(tape, known.forward) if known.forward else tape.values
        self.work = 0.0  #: how many steps have been taken backwards; large ones count more
        self.slopes: dict[Edge, Tensor | None] = {}  #: of hypotheses.py, which keeps them here
        self._locals: dict[int, Local] = {}
        self._of_edges: dict[Edge, Tensor] = {}
        #: the gradients of all values that are reached
        self.gradients: dict[int, Tensor] = {}
        self._of_edges, self.gradients = self._run(known, len(tape.steps) - 1, everywhere=True)

    def under(self, change: Change) -> dict[str, Tensor]:
        """The gradients of the inputs with one more change."""
        both = self.known | change
        if change.forward:
            other = Backward(self.tape, both)
            self.work += other.work + len(self.tape.steps)
            return {name: other.gradient(value) for name, value in self.tape.inputs.items()}
        first = max(
            [edge.step for edge in (*change.edges, *change.operands)]
            + [self.tape.maker.get(value, -1) for value in change.values],
            default=-1,
        )
        changed = {edge.step for edge in (*change.edges, *change.operands)}
        found = self._run(both, first, changed, change.values)[1]
        return {
            name: found[value] if value in found else self.gradient(value)
            for name, value in self.tape.inputs.items()
        }

    def gradient(self, value: int) -> Tensor:
        """The gradient of a value, without a further change."""
        return self.gradients.get(value, torch.zeros_like(self.values[value]))

    def local(self, n: int, others: Mapping[Edge, Tensor] | None = None) -> Local:
        """The graph of a step, with other operands where there are some."""
        if not others and n in self._locals:
            return self._locals[n]
        step, is_active = self.tape.steps[n], self.tape.is_active
        operands, leaves, positions = [], [], []
        for position, value in enumerate(step.operands):
            operand = (others or {}).get(Edge(n, position), self.values[value]).detach()
            if is_active[value]:
                operand.requires_grad_()
                leaves.append(operand)
                positions.append(position)
            operands.append(operand)
        with torch.enable_grad():
            results = step(operands)
        kept = [
            (result, value)
            for result, value in zip(results, step.results, strict=True)
            if is_active[value] and result.requires_grad
        ]
        local = Local(leaves, positions, [each[0] for each in kept], [each[1] for each in kept])
        if not others:
            self._locals[n] = local
        return local

    def through(self, local: Local, of_results: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of a step's operands by the right rule."""
        self.work += 1 + sum(leaf.numel() for leaf in local.leaves) / 1e4
        grads = torch.autograd.grad(
            local.results, local.leaves, of_results, retain_graph=True, allow_unused=True
        )
        return [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(local.leaves, grads, strict=True)
        ]

    def _run(
        self,
        change: Change,
        first: int,
        changed: Collection[int] = (),
        values: Collection[int] = (),
        everywhere: bool = False,
    ) -> tuple[dict[Edge, Tensor], dict[int, Tensor]]:
        """A pass from step `first` downwards, through the steps where anything is different.

        Returns the gradients of the edges and of the values that it computed.
        """
        tape = self.tape
        of_edges: dict[Edge, Tensor] = {}
        found: dict[int, Tensor] = {}
        reached = {tape.result} if everywhere else set()

        def gradient(value: int) -> Tensor | None:
            if value not in found:
                total = torch.ones_like(self.values[value]) if value == tape.result else None
                for edge in tape.uses.get(value, ()):
                    part = of_edges.get(edge, self._of_edges.get(edge))
                    if part is not None:
                        total = part if total is None else total + part
                if total is None:
                    return None
                found[value] = change.values[value](total) if value in change.values else total
            return found[value]

        for n in range(first, -1, -1):
            step = tape.steps[n]
            if n not in changed and not any(v in reached or v in values for v in step.results):
                continue
            others = {edge: other for edge, other in change.operands.items() if edge.step == n}
            local = self.local(n, others)
            if not local.results:
                continue
            of_results = [gradient(value) for value in local.numbers]
            if all(grad is None for grad in of_results):
                continue
            given = [
                torch.zeros_like(result) if grad is None else grad
                for grad, result in zip(of_results, local.results, strict=True)
            ]
            for position, grad in zip(local.positions, self.through(local, given), strict=True):
                edge = Edge(n, position)
                rule = change.edges.get(edge)
                of_edges[edge] = grad if rule is None else rule(given, grad)
                reached.add(step.operands[position])
        for value in (*reached, *values):
            gradient(value)
        return of_edges, found


def forward(tape: Tape, changes: Mapping[int, OfForward]) -> list[Tensor]:
    """The values of a forward pass with mistakes, by the steps that make them."""
    values = list(tape.values)
    touched: set[int] = set()
    for n, step in enumerate(tape.steps):
        operands = [values[value] for value in step.operands]
        if n in changes:
            results: tuple[Tensor, ...] = (changes[n](operands),)
        elif touched.intersection(step.operands):
            results = step(operands)
        else:
            continue
        for value, tensor in zip(step.results, results, strict=False):
            values[value] = tensor
        touched.update(step.results)
    return values
