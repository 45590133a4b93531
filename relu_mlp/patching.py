"""The patching of models that people have: `fuse`, its report, and `unfuse`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar, overload

import torch.nn.functional as F
from torch import Tensor, nn

from . import functional, interception
from ._torch_private import children_of, copy_to_script_wrapper, is_scripting
from .functional import call_operators, is_served, leaves_python
from .interception import are_layers_replaced
from .modules import ReluMLP, slice_or_child
from .rules import (
    FusedModule,
    does_nothing,
    dropouts_of,
    fused_class,
    is_linear_like,
    may_do_nothing,
    problem_of,
    reason_to_leave,
    rule_for,
)
from .run import Run, find_run
from .scripting import Scriptable

M = TypeVar("M", bound=nn.Module)

#: In the __dict__ of what was an `nn.Sequential` before `fuse`.
_MARK = "_is_fused"


class FusedSequential(Scriptable):
    """What `fuse` makes of an `nn.Sequential` that has runs among its children.

    It holds the same children and calls them in the same order, but every run
    of Linear, ReLU, ..., Linear as one operator. Within a run, Identity is passed
    over, and so is Dropout in eval mode or of p = 0.
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return self._scripted_forward(input)
        elif leaves_python():
            return super().forward(input)
        else:
            if are_layers_replaced() or type(self).__iter__ is not interception.iterate:
                return super().forward(input)
            children = list(children_of(self).values())
            position = 0
            while position < len(children):
                run = None
                if is_served(input) and not are_layers_replaced():
                    run, end = _run_at(children, position, does_nothing)
                if run is not None:
                    functional.check_empty_biases(run.weights, run.biases)
                    input = call_operators(input, run.weights, run.biases, run.activation, False)
                    position = end
                else:
                    input = children[position](input)
                    position += 1
            return input

    def _find_runs(self) -> list[tuple[int, Run]]:
        children = list(children_of(self).values())
        runs: list[tuple[int, Run]] = []
        position = 0
        while position < len(children) and not are_layers_replaced():
            # A script may leave eval mode later: nothing is passed over.
            run, end = _run_at(children, position, lambda child: False)
            if run is not None:
                runs.append((position, run))
            position = max(end, position + 1)
        return runs

    @copy_to_script_wrapper
    def __getitem__(self, index: Any) -> Any:
        return slice_or_child(self, index)


def _run_at(
    children: list[nn.Module], start: int, is_passed_over: Callable[[nn.Module], bool]
) -> tuple[Run | None, int]:
    """The run of two Linears or more from `start` on, or None; and where it ends."""
    kept = []
    for n in range(start, len(children)):
        if children[n] is None:  # it can't be called, but that is for the call to say
            break
        if not is_passed_over(children[n]):
            kept.append(n)
    run = find_run([children[n] for n in kept])
    if run is None or len(run.weights) < 2:
        return None, start
    return run, kept[len(run.children) - 1] + 1


# -- The report ------------------------------------------------------------------------------


class Replaced(NamedTuple):
    """A module that `fuse` replaced."""

    name: str  #: as in `named_modules`; empty for the model itself
    kind: str  #: the name of its class before
    became: str  #: the name of its class now
    note: str  #: what is one operator, and when


class Left(NamedTuple):
    """A module with two Linears or more, or one of its Linears, that `fuse` left as it was."""

    name: str  #: as in `named_modules`; empty for the model itself
    kind: str  #: the name of its class
    reason: str


@dataclass(frozen=True)
class FuseReport(Generic[M]):
    """What `fuse(model, report=True)` returns. `print` shows it as text."""

    model: M
    replaced: list[Replaced]
    left: list[Left]

    def __str__(self) -> str:
        replaced = [
            (entry.name, entry.kind, f"{entry.became}: {entry.note}") for entry in self.replaced
        ]
        left = [(entry.name, entry.kind, entry.reason) for entry in self.left]
        return "\n".join(
            [
                f"replaced: {len(replaced) or 'nothing'}",
                *_table(replaced),
                f"left as it was: {len(left) or 'nothing'}",
                *_table(left),
            ]
        )


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    names = [name or "(the model)" for name, _, _ in rows]
    width = max(map(len, names), default=0)
    width_of_kind = max((len(kind) for _, kind, _ in rows), default=0)
    return [
        f"  {name:{width}}  {kind:{width_of_kind}}  {text}"
        for name, (_, kind, text) in zip(names, rows, strict=True)
    ]


# -- Fusing -----------------------------------------------------------------------------------


@overload
def fuse(model: M, report: Literal[False] = False) -> M: ...
@overload
def fuse(model: M, report: Literal[True]) -> FuseReport[M]: ...
def fuse(model: M, report: bool = False) -> M | FuseReport[M]:
    """Patches a model so that its ReLU networks run as one operator each.

    Goes through `model` and all modules in it. An `nn.Sequential` whose
    children are Linear, ReLU, ..., Linear (two Linears or more, and perhaps an
    output activation) becomes a `ReluMLP`, one that has such a run among other
    children goes on holding them and serves the run fused. A module whose class
    has a rule, see `register_fusion`, serves its Linears fused; there are rules for
    the layers of `nn.Transformer`, for T5 and for OPT. It is the class of the
    object that changes: parameters, `state_dict` keys, names and hooks stay.
    Subclasses of `nn.Sequential`, of `Linear` and of classes with a rule stay as
    they are.

    Args:
        model: any module.
        report: return a report on what was replaced, what was not, and why.

    Returns:
        The same object, or with `report` a `FuseReport(model, replaced, left)`.

    Raises:
        TypeError: if `model` is not a module.
    """
    _check_model(model)
    plans = [
        (_plan_for_sequential if type(module) is nn.Sequential else _plan_for_other)(name, module)
        for name, module in model.named_modules()
    ]
    result: FuseReport[M] = FuseReport(model, [], [])
    for plan in plans:
        left = plan.left
        if plan.replaced is not None:
            try:
                _set_class(plan.module, plan.module_class)
            except (TypeError, AttributeError) as error:
                name, kind, *_ = plan.replaced
                left = [Left(name, kind, f"its class can't be changed: {error}")]
            else:
                result.replaced.append(plan.replaced)
                if type(plan.module) in (ReluMLP, FusedSequential):
                    plan.module.__dict__[_MARK] = True
        result.left.extend(left)
    return result if report else model


def unfuse(model: M) -> M:
    """Undoes `fuse`: every module gets back the class that it had.

    What was never fused stays as it is, a `ReluMLP` that somebody made too: of that,
    ``net[:]`` is the `nn.Sequential` of the same children. A fused
    module that got yet another class since, by `fully_shard` for example, keeps it.

    Args:
        model: any module.

    Returns:
        The same object.

    Raises:
        TypeError: if `model` is not a module.
    """
    _check_model(model)
    for module in model.modules():
        kind = type(module)
        if kind in (ReluMLP, FusedSequential) and _MARK in module.__dict__:
            _set_class(module, nn.Sequential)
            for name in (_MARK, "recompute"):
                module.__dict__.pop(name, None)
        elif issubclass(kind, FusedModule) and "_relu_mlp_original" in kind.__dict__:
            _set_class(module, kind._relu_mlp_original)
    return model


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def _set_class(module: nn.Module, module_class: type[nn.Module]) -> None:
    """Gives a module another class, whatever its own class makes of `module.x = y`."""
    object.__setattr__(module, "__class__", module_class)


class _Plan(NamedTuple):
    """What to do with a module."""

    module: nn.Module
    module_class: type[nn.Module]  #: that it is to have
    replaced: Replaced | None  #: if that is another
    left: list[Left]


def _plan_for_sequential(name: str, module: nn.Module) -> _Plan:
    if "forward" in module.__dict__:
        reason = "has a forward of its own"
        return _Plan(module, nn.Sequential, None, [Left(name, "Sequential", reason)])
    names = list(children_of(module))
    children: list[Any] = list(children_of(module).values())
    runs: list[tuple[int, int]] = []
    end = 0
    for position, child in enumerate(children):
        if position < end or may_do_nothing(child):
            continue
        run, stop = _run_at(children, position, may_do_nothing)
        if run is not None and not any(map(problem_of, run.children)):
            runs.append((position, stop))
            end = stop
    module_class: type[nn.Module] = nn.Sequential
    replaced = None
    if runs:
        is_whole = runs == [(0, len(children))] and not any(map(may_do_nothing, children))
        module_class = ReluMLP if is_whole else FusedSequential
        spans = ", ".join(f"{names[start]} to {names[end - 1]}" for start, end in runs)
        inside = [child for start, end in runs for child in children[start:end]]
        note = f"{spans} as one operator{' each' * (len(runs) > 1)}{_when(inside)}"
        replaced = Replaced(name, "Sequential", module_class.__name__, note)
    left = [
        Left(f"{name}.{names[n]}".lstrip("."), type(child).__name__, _why_not(children, n))
        for n, child in enumerate(children)
        if is_linear_like(child) and not any(start <= n < end for start, end in runs)
    ]
    return _Plan(module, module_class, replaced, left if _has_linears(module) else [])


def _plan_for_other(name: str, module: nn.Module) -> _Plan:
    kind = type(module)
    rule = rule_for(kind)
    if isinstance(module, (ReluMLP, FusedSequential, FusedModule)):
        reason = "is fused already"
    elif rule is not None:
        problem = reason_to_leave(module, rule)
        if problem is None:
            module_class = fused_class(kind, rule)
            note = f"{', '.join(rule.linears)} as one operator{_when(dropouts_of(module, rule))}"
            dtypes = {getattr(module, linear).weight.dtype for linear in rule.linears}
            if len(dtypes) > 1:
                note += "; natively without autocast, for the dtypes of the Linears differ"
            replaced = Replaced(name, kind.__name__, module_class.__name__, note)
            return _Plan(module, module_class, replaced, [])
        reason = problem
    elif _has_linears(module):
        reason = _why_no_rule(module)
    else:
        return _Plan(module, kind, None, [])
    return _Plan(module, kind, None, [Left(name, kind.__name__, reason)])


def _has_linears(module: nn.Module) -> bool:
    """Whether there could be a network among its children."""
    return sum(map(is_linear_like, children_of(module).values())) >= 2


def _why_no_rule(module: nn.Module) -> str:
    for child in children_of(module).values():
        if is_linear_like(child) and type(child) is not nn.Linear:
            return f"has a {type(child).__name__} that {problem_of(child)}"
    for base in type(module).__mro__[1:]:
        if base is nn.Sequential:
            return "is a subclass of Sequential"
        if rule_for(base) is not None:
            return f"is a subclass of {base.__name__}: see register_fusion"
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return "is called by another module: see register_fusion for Linears that are attributes"
    return "has no rule for its class: see register_fusion"


def _when(functions: list[Any]) -> str:
    """What to say about the dropouts in a network that is fused."""
    p = max((function.p for function in functions if isinstance(function, nn.Dropout)), default=0)
    if p:
        return f"; natively in training, for a Dropout has p = {p:g}"
    return "; natively where F.dropout drops something" if F.dropout in functions else ""


def _why_not(children: list[nn.Module], position: int) -> str:
    """Why the Linear at a position of an `nn.Sequential` is in no run."""
    problem = problem_of(children[position])
    if problem is not None:
        return problem
    after = [child for child in children[position + 1 :] if not may_do_nothing(child)]
    if not after:
        return "is followed by nothing"
    relu, *rest = after
    if type(relu) is not nn.ReLU or problem_of(relu):
        return f"is followed by {_named(relu)}"
    return f"is followed by ReLU and {_named(rest[0]) if rest else 'nothing'}"


def _named(child: nn.Module) -> str:
    problem = problem_of(child)
    return type(child).__name__ + (f", which {problem}" if problem else "")
