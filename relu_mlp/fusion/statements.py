"""Networks that a method computes in several statements, with hidden tensors in variables.

The statements stay unchanged in one branch. The other branch serves the call with an operator::

    h = F.relu(self.fc1(E))
    h = self.dropout(h)
    y = x + self.fc2(h)

becomes ::

    functions, input = (F.relu, self.fc1), E
    output = self._relu_mlp_try((self.fc2, self.dropout, *functions), input)
    if output is not None:
        y = x + output
    else:
        h = self._relu_mlp_natively(functions, input)
        h = self.dropout(h)
        y = x + self.fc2(h)

This is right only if nothing else reads the variables while they hold a hidden tensor.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .source import value_of
from .steps import CAST, Method, Path, Step, tuple_of

#: How T5 calls its second Linear, which may be kept in another dtype.
_CAST = """
if (
    isinstance({linear}.weight, torch.Tensor)
    and {hidden}.dtype != {linear}.weight.dtype
    and {linear}.weight.dtype != torch.int8
):
    {hidden} = {hidden}.to({linear}.weight.dtype)
"""

_BRANCHES = """
_relu_mlp_functions = FIRST
_relu_mlp_input = INPUT
_relu_mlp_output = SELF._relu_mlp_try(ALL, _relu_mlp_input)
if _relu_mlp_output is not None:
    SERVED
    _relu_mlp_functions = _relu_mlp_input = _relu_mlp_output = None
else:
    HIDDEN = SELF._relu_mlp_natively(_relu_mlp_functions, _relu_mlp_input)
    _relu_mlp_functions = _relu_mlp_input = None
    OTHERS
"""

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_LOOPS = (ast.For, ast.AsyncFor, ast.While)

#: Statements that may catch an exception, after which the method goes on.
_GUARDS = tuple(
    getattr(ast, name) for name in ("Try", "TryStar", "With", "AsyncWith") if hasattr(ast, name)
)


class Statements(NamedTuple):
    """A network in the statements [start, stop) of a block, and the replacement for them."""

    block: list[ast.stmt]
    start: int
    stop: int
    replacement: list[ast.stmt]
    network: list[Path]


def networks_in_statements(method: Method) -> Iterator[Statements]:
    """All networks in the statements of a method, in blocks at any depth."""
    return _Finder(method).all()


class _Finder:
    def __init__(self, method: Method) -> None:
        self.method = method
        self.augmented = {
            id(part.target) for part in ast.walk(method.node) if isinstance(part, ast.AugAssign)
        }

    def all(self) -> Iterator[Statements]:
        node = self.method.node
        parents = {
            child: parent for parent in ast.walk(node) for child in ast.iter_child_nodes(parent)
        }
        for owner in ast.walk(node):
            around = [owner]
            while around[-1] is not node:
                around.append(parents[around[-1]])
            if any(isinstance(part, (*_SCOPES, ast.Lambda)) for part in around[:-1]):
                continue
            for field in ("body", "orelse", "finalbody"):
                block, start = getattr(owner, field, None), 0
                while isinstance(block, list) and start < len(block):
                    found = self._starting_at(block, start, around)
                    if found is not None:
                        yield found
                    start = start + 1 if found is None else found.stop

    def _starting_at(
        self, block: list[ast.stmt], start: int, around: list[ast.AST]
    ) -> Statements | None:
        """The network that begins with the statement at `start`, or None."""
        method = self.method
        last_linear = ("self", method.linears[-1])
        name, value = _assignment(block[start])
        first = method.steps(value) if name else []
        if not first or not method.is_network(first, is_whole=False):
            return None
        # The statements that only pass the hidden tensor on.
        steps, hidden, at = list(first), [name], start
        while True:
            at += 1
            if at == len(block):
                return None
            target, value = _assignment(block[at])
            more = method.steps(value, name) if target else []
            if self._is_cast(block[at], name, steps):
                steps.append(method.special_step(CAST, None))
            elif more and more[-1].path != last_linear:
                steps += more
                hidden.append(name := target)
            else:
                break
        # The statement in which the last Linear is called.
        last = block[at]
        for call in ast.walk(last):
            more = method.steps(call, name) if isinstance(call, ast.Call) else []
            if more and more[-1].path == last_linear:
                break
        else:
            return None
        own = {id(part) for statement in block[start + 1 : at] for part in ast.walk(statement)}
        own.add(id(more[0].argument))
        if (
            not method.is_network([*steps, *more])
            or not self._is_first_effect(last, call)
            or not all(self._is_unseen(n, own, block[start], last, around) for n in hidden)
        ):
            return None
        functions = ast.Starred(ast.Name("_relu_mlp_functions", ast.Load()), ast.Load())
        output = ast.copy_location(ast.Name("_relu_mlp_output", ast.Load()), call)
        replacement = method.filled(
            _BRANCHES,
            block[start],
            FIRST=tuple_of(first),
            INPUT=first[0].argument,
            ALL=tuple_of([*steps[len(first) :], *more], functions),
            SERVED=[copy.deepcopy(last, {id(call): output})],
            HIDDEN=ast.Name(hidden[0], ast.Store()),
            OTHERS=block[start + 1 : at + 1],
        )
        network = [step.path for step in (*steps, *more)]
        return Statements(block, start, at + 1, replacement, network)

    def _is_cast(self, statement: ast.stmt, hidden: str, steps: list[Step]) -> bool:
        """Whether a statement casts the hidden tensor to the dtype of the next Linear."""
        method = self.method
        called = sum(step.path in [("self", name) for name in method.linears] for step in steps)
        linear = f"{method.self_name}.{method.linears[called]}"
        cast = ast.parse(_CAST.format(hidden=hidden, linear=linear)).body[0]
        return (
            ast.dump(statement) == ast.dump(cast)
            and {"torch", "isinstance"}.isdisjoint(method.bound)
            and value_of(method.function, None, ("torch",)) is torch
            and value_of(method.function, None, ("isinstance",)) is isinstance
        )

    def _is_first_effect(self, node: ast.AST, call: ast.AST) -> bool:
        """Whether a statement only reads names before it evaluates a call."""
        if node is call:
            return True
        if isinstance(node, ast.AugAssign) and not isinstance(node.target, ast.Name):
            return False
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)):
            return node.value is not None and self._is_first_effect(node.value, call)
        kinds = (ast.BinOp, ast.UnaryOp, ast.Call, ast.keyword, ast.Tuple, ast.List)
        if not isinstance(node, kinds):
            return False
        for child in ast.iter_child_nodes(node):
            if any(part is call for part in ast.walk(child)):
                return self._is_first_effect(child, call)
            if isinstance(child, ast.expr) and not (
                isinstance(child, (ast.Constant, ast.Name)) or self.method.path(child)
            ):
                return False
        return False

    def _is_unseen(
        self, name: str, own: set[int], first: ast.stmt, last: ast.stmt, around: list[ast.AST]
    ) -> bool:
        """Whether only the network reads a variable while it holds a hidden tensor.

        Args:
            name: the variable.
            own: the ids of the nodes of the network's statements, except the first.
            first, last: the first and the last statement of the network.
            around: the statements that contain them.
        """
        code = self.method.function.__code__
        end = first.end_lineno or 0, first.end_col_offset or 0
        is_repeated = any(isinstance(part, _LOOPS) for part in around)
        is_guarded = any(isinstance(part, _GUARDS) for part in around)
        is_read_later = any(
            isinstance(part, ast.Name)
            and part.id == name
            and (not isinstance(part.ctx, ast.Store) or id(part) in self.augmented)
            and id(part) not in own
            and (is_repeated or (part.lineno, part.col_offset) > end)
            for part in ast.walk(self.method.node)
        )
        is_overwritten = _assignment(last)[0] == name and not is_guarded
        is_local = name in code.co_varnames and name not in code.co_cellvars
        return is_local and (is_overwritten or not is_read_later)


def _assignment(statement: ast.stmt) -> tuple[str, Any]:
    """The variable that a statement assigns to, or "", and the value."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign):
        target = statement.target
    else:
        return "", None
    return (target.id if isinstance(target, ast.Name) else ""), statement.value
