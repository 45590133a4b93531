"""The calls that a hidden tensor goes through, read from an expression of a method."""

from __future__ import annotations

import ast
import types
from typing import Any, NamedTuple

from torch import nn

from .source import bound_names, is_computed, is_name

#: Dotted names; the first is "self" for the object that the method belongs to.
Path = tuple[str, ...]

#: Steps that call no function: methods of the hidden tensor, and its cast to another dtype.
METHODS = (".relu", ".relu_")
CAST = ".cast"


class Step(NamedTuple):
    """One call that the hidden tensor goes through."""

    path: Path
    function: ast.expr  #: as `_relu_mlp_call` takes it
    argument: Any  #: the expression


class Method:
    """The source of a method, and the names of the Linears that may form a network in it."""

    def __init__(
        self,
        module_class: type[nn.Module],
        function: types.FunctionType,
        node: Any,
        linears: tuple[str, ...],
    ) -> None:
        self.module_class = module_class
        self.function = function
        self.node = node
        self.linears = linears
        arguments = [*node.args.posonlyargs, *node.args.args]
        self.self_name = arguments[0].arg if arguments else ""
        self.bound = bound_names(node)

    def steps(self, node: Any, hidden: str | None = None) -> list[Step]:
        """The calls that lead from the input of the first Linear to the value of an expression.

        With `hidden`, they lead from the variable of that name instead. They are in the order of
        the calls. The list is empty if the expression has another form.
        """
        steps: list[Step] = []
        while not is_name(node, hidden or ""):
            step = self._step(node)
            if step is None:
                return []
            steps.insert(0, step)
            node = step.argument
            if step.path == ("self", self.linears[0]):
                return [] if hidden else steps
        return steps

    def _step(self, node: Any) -> Step | None:
        if not isinstance(node, ast.Call):
            return None
        callee, arguments, keywords = node.func, node.args, node.keywords
        if not arguments and not keywords:  # h.relu()
            if not isinstance(callee, ast.Attribute) or f".{callee.attr}" not in METHODS:
                return None
            return self.special_step(f".{callee.attr}", callee.value)
        path = self.path(callee)
        if path is None or not arguments or isinstance(arguments[0], ast.Starred):
            return None
        others = [*arguments[1:], *(keyword.value for keyword in keywords)]
        if not others:
            return Step(path, callee, arguments[0])
        if not all(keyword.arg for keyword in keywords):
            return None
        if not all(isinstance(other, ast.Constant) or self.path(other) for other in others):
            return None
        keys: list[Any] = [ast.Constant(keyword.arg) for keyword in keywords]
        values = [keyword.value for keyword in keywords]
        (call,) = self.filled(
            "SELF._relu_mlp_with(FUNCTION, lambda: (ARGUMENTS, KEYWORDS))",
            node,
            FUNCTION=callee,
            ARGUMENTS=ast.Tuple(arguments[1:], ast.Load()),
            KEYWORDS=ast.Dict(keys, values),
        )
        return Step(path, call.value, arguments[0])

    def special_step(self, kind: str, argument: ast.expr | None) -> Step:
        """A step of `METHODS`, or `CAST`."""
        name = f"_relu_mlp_{kind[1:]}"
        function = ast.Attribute(ast.Name(self.self_name, ast.Load()), name, ast.Load())
        return Step((kind,), function, argument)

    def path(self, node: Any) -> Path | None:
        """The dotted names of an attribute of self or of a global variable, if reading it has
        no effects."""
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return None
        if node.id != self.self_name:
            return None if node.id in self.bound else (node.id, *names)
        if not names:
            return None
        return None if is_computed(self.module_class, names[0]) else ("self", *names)

    def is_network(self, steps: list[Step], is_whole: bool = True) -> bool:
        """Whether these steps call all Linears, in order and from the first to the last.

        With `is_whole=False`: the first Linears, in order, but not all of them.
        """
        positions: dict[Path, int] = {("self", name): n for n, name in enumerate(self.linears)}
        numbers = [positions.get(step.path) for step in steps]
        called = [n for n in numbers if n is not None]
        return (
            numbers[0] == 0
            and called == list(range(len(called)))
            and (len(called) == len(self.linears)) == is_whole
            and (not is_whole or numbers[-1] is not None)
        )

    def filled(self, template: str, where: ast.AST, **parts: Any) -> list[Any]:
        """Statements from a template, whose names in capital letters stand for other pieces."""
        tree = ast.parse(template)
        for part in ast.walk(tree):
            ast.copy_location(part, where)
        _Filler({"SELF": ast.Name(self.self_name, ast.Load()), **parts}).visit(tree)
        return tree.body


class _Filler(ast.NodeTransformer):
    """Replaces names by pieces of source."""

    def __init__(self, parts: dict[str, Any]) -> None:
        self.parts = parts

    def visit_Name(self, node: ast.Name) -> Any:
        return self.parts.get(node.id, node)

    def visit_Expr(self, node: ast.Expr) -> Any:
        part = self.visit(node.value)
        return part if isinstance(part, list) else ast.copy_location(ast.Expr(part), node)


def tuple_of(steps: list[Step], *others: ast.expr) -> ast.Tuple:
    """The functions of some steps in reverse order, as a nested call evaluates them."""
    return ast.Tuple([*(step.function for step in reversed(steps)), *others], ast.Load())
