"""`fuse` and `unfuse`: give modules of a model another class, and restore the classes."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch.nn.functional as F
from torch import nn

from .._torch_private import children_of
from ..modules import ReluMLP
from .classes import FusedModule, fused_class
from .conditions import is_linear_like, may_do_nothing, problem_of
from .known_models import register_known_models
from .matching import dropouts_of, reason_to_leave
from .report import FuseReport, Left, M, Replaced
from .rules import rule_for
from .sequential import FusedSequential, run_at

register_known_models()

#: A key in the __dict__ of a module that was an `nn.Sequential` before `fuse`.
_MARK = "_is_fused"


@overload
def fuse(model: M, report: Literal[False] = False) -> M: ...
@overload
def fuse(model: M, report: Literal[True]) -> FuseReport[M]: ...
def fuse(model: M, report: bool = False) -> M | FuseReport[M]:
    """Patches a model so that each of its ReLU networks runs as one operator.

    Visits `model` and all modules in it. An `nn.Sequential` whose children are Linear,
    ReLU, ..., Linear (two Linears or more, and perhaps an output activation) becomes a
    `ReluMLP`. An `nn.Sequential` that has such a run among other children becomes a
    `FusedSequential`, which holds the same children and runs the run fused. A module
    whose class has a rule (see `register_fusion`) runs its Linears fused; the package has
    rules for the layers of `nn.Transformer`, for T5 and for OPT. Only the class of an
    object changes: parameters, `state_dict` keys, names and hooks stay. Subclasses of
    `nn.Sequential`, of `Linear` and of classes with a rule are left as they are.

    Outputs and gradients stay the same. The formula is that of `relu_mlp`.

    Args:
        model: any module, with parameters of any dtype. A network of a dtype that the operators
            don't support stays as it is.
        report: whether to return a report of the modules that were replaced, those that were not,
            and the reasons.

    Returns:
        The same object, or with `report=True` a `FuseReport(model, replaced, left)`.

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

    A module that was not made by `fuse` is left as it is. That includes a `ReluMLP` that
    was constructed: ``net[:]`` is the `nn.Sequential` of its children. A fused module
    whose class has changed since, by `fully_shard` for example, keeps its class.

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
    """Gives a module another class, even if its own class overrides `__setattr__`."""
    object.__setattr__(module, "__class__", module_class)


class _Plan(NamedTuple):
    """The change that `fuse` makes to one module."""

    module: nn.Module
    module_class: type[nn.Module]  #: the class that it gets
    replaced: Replaced | None  #: None if that is the class that it has
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
        run, stop = run_at(children, position, may_do_nothing)
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
                note += "; native without autocast, because the dtypes of the Linears differ"
            replaced = Replaced(name, kind.__name__, module_class.__name__, note)
            return _Plan(module, module_class, replaced, [])
        reason = problem
    elif _has_linears(module):
        reason = _why_no_rule(module)
    else:
        return _Plan(module, kind, None, [])
    return _Plan(module, kind, None, [Left(name, kind.__name__, reason)])


def _has_linears(module: nn.Module) -> bool:
    """Whether a module has two children or more that look like Linears."""
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
    """For a report: when the dropouts of a network make it run natively."""
    p = max((function.p for function in functions if isinstance(function, nn.Dropout)), default=0)
    if p:
        return f"; native in training, because a Dropout has p = {p:g}"
    return "; native when F.dropout drops something" if F.dropout in functions else ""


def _why_not(children: list[nn.Module], position: int) -> str:
    """The reason why the Linear at a position of an `nn.Sequential` is not in a run."""
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
