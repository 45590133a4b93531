"""Whether a module matches its rule."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .classes import fused_method
from .conditions import DROPOUT_FUNCTION, described, is_relu, may_do_nothing, problem_of
from .recognition import NotRecognized, RecognizedMethod
from .rules import Rule
from .source import is_computed, value_of
from .steps import CAST, METHODS, Path


def reason_to_leave(module: nn.Module, rule: Rule) -> str | None:
    """The reason why a module does not match its rule, or None."""
    if rule.method in module.__dict__:
        return f"has a {rule.method} of its own"
    if not callable(getattr(type(module), rule.method, None)):
        return f"has no method {rule.method}, which its rule names"
    names = filter(None, (*rule.linears, rule.activation, rule.dropout))
    named = {name: _attribute(module, name) for name in names}
    for name in rule.linears:
        linear = named[name]
        if not isinstance(linear, nn.Linear):
            return f"its {name} is not a Linear but {described(linear)}"
        if problem := problem_of(linear):
            return f"its {name} {problem}"
    for name in filter(None, (rule.activation, rule.dropout)):
        if problem := problem_of(named[name]):
            return f"its {name} {problem}"
    if rule.activation is not None and not is_relu(named[rule.activation]):
        return f"its {rule.activation} is {described(named[rule.activation])}"
    if rule.dropout is not None:
        dropout = named[rule.dropout]
        if not isinstance(dropout, nn.Module) or not may_do_nothing(dropout):
            return f"its {rule.dropout} is not a Dropout but {described(dropout)}"
    try:
        method = fused_method(type(module), rule)
    except NotRecognized as reason:
        return str(reason)
    problems = [_problem_between(module, rule, method, network) for network in method.networks]
    return None if None in problems else problems[0]


def dropouts_of(module: nn.Module, rule: Rule) -> list[Any]:
    """The dropouts in the networks of a module that matches its rule."""
    method = fused_method(type(module), rule)
    values = [
        value_of(method.function, module, path) for network in method.networks for path in network
    ]
    return [value for value in values if value is DROPOUT_FUNCTION or type(value) is nn.Dropout]


def _attribute(module: nn.Module, name: str) -> Any:
    """An attribute. For a property it is the property object, whose value may have side effects."""
    if is_computed(type(module), name):
        return inspect.getattr_static(type(module), name)
    return getattr(module, name, None)


def _problem_between(
    module: nn.Module, rule: Rule, method: RecognizedMethod, network: list[Path]
) -> str | None:
    """A call in a network other than Linear, ReLU and dropout, or a place where ReLU is missing."""
    is_activated = True
    for path in network:
        if path[0] == "self" and path[1] in rule.linears:
            if not is_activated:
                return f"its {rule.method} calls no ReLU before {path[1]}"
            is_activated = False
        elif path[0] in METHODS:
            is_activated = True
        elif path[0] != CAST:
            function = value_of(method.function, module, path)
            if problem := problem_of(function):
                return f"its {path[-1]} {problem}"
            if is_relu(function):
                is_activated = True
            elif function is not DROPOUT_FUNCTION and not may_do_nothing(function):
                return f"its {rule.method} calls {path[-1]}, which is {described(function)}"
    return None
