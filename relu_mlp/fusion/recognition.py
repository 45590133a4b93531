"""The networks in a method: recognized in its source, and replaced there by fused calls.

A network is recognized in two forms. One is an expression, whose hidden values no other code sees::

    self.fc2(self.dropout(F.relu(self.fc1(E))))

It becomes a call that evaluates the same things in the same order::

    self._relu_mlp_call((self.fc2, self.dropout, F.relu, self.fc1), E)

The other form is a sequence of statements, see statements.py.

The rest of the method may be anything. It is searched only for readers of the variables that hold
hidden values. Names are looked up in every call, so they have their current meaning. The source is
verified: compiling it must give the method's code.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
from typing import Any, NamedTuple

from torch import nn

from .source import (
    READS_VARIABLES,
    bound_names,
    cells_of,
    contents_of,
    copied,
    is_name,
    names_in,
    recompiled,
    source_of,
)
from .statements import networks_in_statements
from .steps import Method, Path, tuple_of

_IS_PAUSED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class NotRecognized(Exception):
    """A method or a class can't be fused. The message is the reason, with the module as subject."""


class RecognizedMethod(NamedTuple):
    """A method whose networks were found."""

    function: types.FunctionType  #: the method with its networks fused
    networks: list[list[Path]]  #: the functions that each network calls, in the order of the calls
    knows_itself: bool  #: whether a decorator's function has a reference to itself


def recognize(
    module_class: type[nn.Module], function: Any, linears: tuple[str, ...]
) -> RecognizedMethod:
    """Finds the networks of these Linears in a method of a class.

    Raises:
        NotRecognized: if there are none, or if the source can't be found.
    """
    name = getattr(function, "__name__", repr(function))
    if type(function) is not types.FunctionType or function.__code__.co_flags & _IS_PAUSED:
        raise NotRecognized(f"its {name} is not a plain function")
    if (
        module_class.__getattribute__ is not object.__getattribute__
        or module_class.__getattr__ is not nn.Module.__getattr__
    ):
        raise NotRecognized("its class looks up attributes in a way of its own")
    if hasattr(function, "__wrapped__"):
        return _recognize_decorated(module_class, function, linears)
    tree, node = _checked_source(function)
    networks = _Rewriter(Method(module_class, function, node, linears)).rewrite()
    if not networks:
        calls = f"self.{linears[0]}(...)"
        for linear in linears[1:]:
            calls = f"self.{linear}(relu({calls}))"
        raise NotRecognized(f"its {name} computes no {calls} that hides its values from others")
    return RecognizedMethod(recompiled(function, tree, node), networks, False)


def _checked_source(function: types.FunctionType) -> tuple[ast.Module, Any]:
    found = source_of(function)
    if found is None:
        raise NotRecognized(f"the source of its {function.__name__} is not at hand")
    return found


# -- Decorated methods ------------------------------------------------------------------------


def _recognize_decorated(
    module_class: type[nn.Module], function: types.FunctionType, linears: tuple[str, ...]
) -> RecognizedMethod:
    """The function that a decorator returned, with the method that it wraps rewritten.

    Nothing else changes if that function only calls the method or asks for its name.
    """
    inner = function.__wrapped__  # type: ignore[attr-defined]
    cells = cells_of(function)
    names = [name for name, cell in cells.items() if contents_of(cell) is inner]
    if len(names) != 1 or not _is_only_called(function, names[0]):
        raise NotRecognized(f"its {function.__name__} has a decorator that may do anything")
    found = recognize(module_class, inner, linears)
    knows_itself = any(contents_of(cell) is function for cell in cells.values())
    outer = copied(function, function.__code__, cells | {names[0]: types.CellType(found.function)})
    return RecognizedMethod(outer, found.networks, knows_itself or found.knows_itself)


def _is_only_called(function: types.FunctionType, name: str) -> bool:
    """Whether a function only calls one of its free variables, directly or with a
    `functools.partial`, or reads its name."""
    _, node = _checked_source(function)
    parts = [part for statement in node.body for part in ast.walk(statement)]
    harmless: list[Any] = []
    for part in parts:
        if isinstance(part, ast.Call):
            harmless.append(part.func)
            if function.__globals__.get(getattr(part.func, "id", "")) is functools.partial:
                harmless += part.args[:1]
        elif isinstance(part, ast.Attribute) and part.attr in ("__name__", "__qualname__"):
            harmless.append(part.value)
    uses = {id(part) for part in parts if is_name(part, name)}
    return (
        uses <= set(map(id, harmless))
        and name not in bound_names(node)
        and READS_VARIABLES.isdisjoint(names_in(node))
    )


# -- Rewriting --------------------------------------------------------------------------------


class _Rewriter(ast.NodeTransformer):
    """Finds the networks of a method in its source, and replaces them there."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.networks: list[list[Path]] = []

    def rewrite(self) -> list[list[Path]]:
        method = self.method
        name = method.function.__name__
        if method.bound.count(method.self_name) != 1:
            raise NotRecognized(f"its {name} may rebind the name of its object")
        if self._asks_for_its_class():
            raise NotRecognized(f"its {name} asks for the class of its object")
        if READS_VARIABLES.isdisjoint(names_in(method.node)):
            for found in reversed(list(networks_in_statements(method))):
                found.block[found.start : found.stop] = found.replacement
                self.networks.append(found.network)
        method.node.body = [self.visit(statement) for statement in method.node.body]
        return self.networks

    def _asks_for_its_class(self) -> bool:
        """Whether the method could tell the fused class from the class it was written for."""
        return any(
            (isinstance(part, ast.Attribute) and part.attr == "__class__")
            or (
                isinstance(part, ast.Call)
                and is_name(part.func, "type")
                and any(is_name(argument, self.method.self_name) for argument in part.args)
            )
            for part in ast.walk(self.method.node)
        )

    def visit_Call(self, node: ast.Call) -> ast.AST:
        steps = self.method.steps(node)
        if not steps or not self.method.is_network(steps):
            return self.generic_visit(node)
        self.networks.append([step.path for step in steps])
        (call,) = self.method.filled(
            "SELF._relu_mlp_call(ALL, INPUT)",
            node,
            ALL=tuple_of(steps),
            INPUT=self.visit(steps[0].argument),
        )
        return call.value
