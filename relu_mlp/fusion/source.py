"""Functions and their source: code, closures, and the values of names."""

from __future__ import annotations
import __future__

import ast
import builtins
import functools
import inspect
import linecache
import operator
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

#: Functions with which a function could read its own variables.
READS_VARIABLES = {"locals", "vars", "dir", "eval", "exec", "inspect", "_getframe", "currentframe"}

#: `from __future__ import annotations` and the like, which a notebook inherits from another cell.
_FUTURE = functools.reduce(
    operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)


# -- Source and code --------------------------------------------------------------------------


def source_of(function: types.FunctionType) -> tuple[ast.Module, Any] | None:
    """The source as a module that can be compiled, and the function's node in it.

    None if the source can't be found, or if the function was compiled from another source. To find
    out, the source is compiled again, and must give the function's code.
    """
    code = function.__code__
    try:
        tree = ast.parse("".join(linecache.getlines(code.co_filename, function.__globals__)))
    except (SyntaxError, ValueError, RecursionError):
        tree = ast.Module([], [])
    tree.body = [
        statement
        for statement in tree.body
        if _first_line(statement) <= code.co_firstlineno <= (statement.end_lineno or 0)
        # The code of a call of `torch.relu` depends on whether `torch` is imported.
        or any(isinstance(part, (ast.Import, ast.ImportFrom)) for part in ast.walk(statement))
    ]
    nodes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and _first_line(node) == code.co_firstlineno
    ]
    if len(nodes) != 1:
        return None
    # PyTorch 2.15 renames the code of its decorators, so that stack traces show "no_grad".
    written = _unspecialized(code).replace(co_name=nodes[0].name)
    return (tree, nodes[0]) if written in _codes(_compiled(tree, code)) else None


def recompiled(function: types.FunctionType, tree: ast.Module, node: Any) -> types.FunctionType:
    """The function compiled from a tree that was changed since `source_of` returned it."""
    code = function.__code__
    (new,) = (
        found
        for found in _codes(_compiled(ast.fix_missing_locations(tree), code))
        if (found.co_name, found.co_firstlineno) == (node.name, code.co_firstlineno)
    )
    return copied(function, new.replace(co_name=code.co_name), cells_of(function))


def _first_line(node: Any) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])


def _compiled(tree: ast.Module, code: types.CodeType) -> types.CodeType:
    flags = code.co_flags & _FUTURE
    return compile(tree, code.co_filename, "exec", flags, dont_inherit=True)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of all functions and classes in some code, at any depth."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _codes(constant)


def _unspecialized(code: types.CodeType) -> types.CodeType:
    """A copy that never ran. Python 3.11 compares code with the specializations it has made."""
    constants = (
        _unspecialized(constant) if isinstance(constant, types.CodeType) else constant
        for constant in code.co_consts
    )
    return code.replace(co_consts=tuple(constants))


def copied(
    function: types.FunctionType, code: types.CodeType, cells: dict[str, types.CellType]
) -> types.FunctionType:
    """A function with other code or another closure, and everything else as it was."""
    closure = tuple(cells[name] for name in code.co_freevars)
    result = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    result.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(result, function)
    return result


# -- The values of names ----------------------------------------------------------------------


def cells_of(function: types.FunctionType) -> dict[str, types.CellType]:
    """The closure of a function, by name."""
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))


def contents_of(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the cell is empty
        return None


def value_of(function: Any, module: nn.Module | None, path: tuple[str, ...]) -> Any:
    """The value of dotted names in a method of a module; None if they have none."""
    root, *attributes = path
    value: Any = module
    if root != "self":
        function = inspect.unwrap(function)
        cell = cells_of(function).get(root)
        known = function.__globals__.get(root, getattr(builtins, root, None))
        value = known if cell is None else contents_of(cell)
    for attribute in attributes:
        value = getattr(value, attribute, None)
    return value


def is_computed(module_class: type, name: str) -> bool:
    """Whether reading an attribute runs code of its class, as a property does."""
    attribute = inspect.getattr_static(module_class, name, None)
    return hasattr(type(attribute), "__get__") and not isinstance(
        attribute, (staticmethod, types.FunctionType)
    )


# -- Names in a tree --------------------------------------------------------------------------


def is_name(node: Any, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def names_in(node: ast.AST) -> Iterator[str]:
    """All names in a piece of source, and all names of attributes."""
    for part in ast.walk(node):
        if isinstance(part, (ast.Name, ast.Attribute)):
            yield part.id if isinstance(part, ast.Name) else part.attr


def bound_names(node: ast.AST) -> list[str]:
    """The names that a function binds or declares anywhere, once for each time."""
    names: list[Any] = []
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            names += [] if isinstance(part.ctx, ast.Load) else [part.id]
        elif isinstance(part, ast.arg):
            names.append(part.arg)
        elif isinstance(part, ast.alias):
            names.append((part.asname or part.name).split(".")[0])
        elif isinstance(part, (ast.Global, ast.Nonlocal)):
            names += part.names
        elif part is not node:  # functions, classes, handlers, patterns, type parameters
            names += [getattr(part, "name", None), getattr(part, "rest", None)]
    return [name for name in names if isinstance(name, str)]
