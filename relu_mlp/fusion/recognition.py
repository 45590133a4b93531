"""The networks in a method, recognised in its source, and the method with them fused.

A network is recognised in two forms. One is an expression, whose hidden values nobody sees::

    self.fc2(self.dropout(F.relu(self.fc1(E))))

It becomes a call that evaluates the same things in the same order::

    self._relu_mlp_call((self.fc2, self.dropout, F.relu, self.fc1), E)

The other is a row of statements, whose hidden values are in variables that nobody else reads::

    h = F.relu(self.fc1(E))
    h = self.dropout(h)
    y = x + self.fc2(h)

They stay as they are, beside a branch for what the operators serve::

    functions, input = (F.relu, self.fc1), E
    output = self._relu_mlp_try((self.fc2, self.dropout, *functions), input)
    if output is not None:
        y = x + output
    else:
        h = self._relu_mlp_natively(functions, input)
        h = self.dropout(h)
        y = x + self.fc2(h)

The rest of the method is not looked at, but for who reads the variables: it may be anything.
What the names mean is decided by the values that they have, in every call. That the source is
the right one is certain: it is compiled, and has to give the code that the method has.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import copy
import functools
import inspect
import linecache
import operator
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

#: Dotted names; the first is "self" for the object whose method it is.
Path = tuple[str, ...]

#: Steps that are no calls of functions: of methods of the hidden tensor, and `_CAST`.
METHODS = (".relu", ".relu_")
CAST = ".cast"

#: How T5 calls its second Linear, which may be kept in another dtype.
_CAST = """
if (
    isinstance({linear}.weight, torch.Tensor)
    and {hidden}.dtype != {linear}.weight.dtype
    and {linear}.weight.dtype != torch.int8
):
    {hidden} = {hidden}.to({linear}.weight.dtype)
"""

_STATEMENTS = """
_relu_mlp_functions = FIRST
_relu_mlp_input = INPUT
_relu_mlp_output = ME._relu_mlp_try(ALL, _relu_mlp_input)
if _relu_mlp_output is not None:
    SERVED
    _relu_mlp_functions = _relu_mlp_input = _relu_mlp_output = None
else:
    HIDDEN = ME._relu_mlp_natively(_relu_mlp_functions, _relu_mlp_input)
    _relu_mlp_functions = _relu_mlp_input = None
    OTHERS
"""

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_LOOPS = (ast.For, ast.AsyncFor, ast.While)
#: Statements in which an exception may end, and the method go on.
_GUARDS = tuple(
    getattr(ast, name) for name in ("Try", "TryStar", "With", "AsyncWith") if hasattr(ast, name)
)
#: What a function could read its own variables by.
_READERS = {"locals", "vars", "dir", "eval", "exec", "inspect", "_getframe", "currentframe"}
#: `from __future__ import annotations` and the like, which a notebook takes from another cell.
_FUTURE = functools.reduce(
    operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
_IS_PAUSED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class NotRecognised(Exception):
    """A method, or a class, that can't be fused. The argument says why, of the module."""


class Recognised(NamedTuple):
    """A method whose networks were found."""

    function: types.FunctionType  #: the method with its networks fused
    networks: list[list[Path]]  #: what each calls, in the order of the calls
    knows_itself: bool  #: whether a decorator's function has a reference to itself


def recognise(module_class: type[nn.Module], function: Any, linears: tuple[str, ...]) -> Recognised:
    """Finds the networks of these Linears in a method of a class.

    Raises:
        NotRecognised: if there are none, or the source is not at hand.
    """
    name = getattr(function, "__name__", repr(function))
    if type(function) is not types.FunctionType or function.__code__.co_flags & _IS_PAUSED:
        raise NotRecognised(f"its {name} is no plain function")
    if (
        module_class.__getattribute__ is not object.__getattribute__
        or module_class.__getattr__ is not nn.Module.__getattr__
    ):
        raise NotRecognised("its class looks up attributes in a way of its own")
    if hasattr(function, "__wrapped__"):
        return _recognise_inside(module_class, function, linears)
    tree, node = _source_of(function)
    networks = _Rewriter(module_class, function, node, linears).rewrite()
    if not networks:
        calls = f"self.{linears[0]}(...)"
        for linear in linears[1:]:
            calls = f"self.{linear}(relu({calls}))"
        raise NotRecognised(f"its {name} computes no {calls} that hides its values from others")
    code = function.__code__
    (new,) = (
        found
        for found in _codes(_compile(ast.fix_missing_locations(tree), code))
        if (found.co_name, found.co_firstlineno) == (code.co_name, code.co_firstlineno)
    )
    return Recognised(_copied(function, new, _cells(function)), networks, False)


def value_of(function: Any, module: nn.Module | None, path: Path) -> Any:
    """What dotted names mean in a method of a module; None if nothing."""
    root, *attributes = path
    value: Any = module
    if root != "self":
        function = inspect.unwrap(function)
        cell = _cells(function).get(root)
        known = function.__globals__.get(root, getattr(builtins, root, None))
        value = known if cell is None else _contents(cell)
    for attribute in attributes:
        value = getattr(value, attribute, None)
    return value


def is_computed(module_class: type, name: str) -> bool:
    """Whether looking up an attribute runs code of its class: a property, say."""
    attribute = inspect.getattr_static(module_class, name, None)
    return hasattr(type(attribute), "__get__") and not isinstance(
        attribute, (staticmethod, types.FunctionType)
    )


# -- Functions and their source ---------------------------------------------------------------


def _source_of(function: types.FunctionType) -> tuple[ast.Module, Any]:
    """The source of a function: a module that can be compiled, and the function's node in it."""
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
        and (node.name, _first_line(node)) == (code.co_name, code.co_firstlineno)
    ]
    if len(nodes) != 1 or _unspecialized(code) not in _codes(_compile(tree, code)):
        raise NotRecognised(f"the source of its {function.__name__} is not at hand")
    return tree, nodes[0]


def _first_line(node: Any) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])


def _compile(tree: ast.Module, code: types.CodeType) -> types.CodeType:
    flags = code.co_flags & _FUTURE
    return compile(tree, code.co_filename, "exec", flags, dont_inherit=True)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of the functions and classes in some code, at any depth."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _codes(constant)


def _unspecialized(code: types.CodeType) -> types.CodeType:
    """The same code, never run: Python 3.11 finds code different that it has specialized."""
    constants = (
        _unspecialized(constant) if isinstance(constant, types.CodeType) else constant
        for constant in code.co_consts
    )
    return code.replace(co_consts=tuple(constants))


def _cells(function: types.FunctionType) -> dict[str, types.CellType]:
    """The closure of a function, by name."""
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _copied(
    function: types.FunctionType, code: types.CodeType, cells: dict[str, types.CellType]
) -> types.FunctionType:
    """The same function with other code, or with another closure."""
    closure = tuple(cells[name] for name in code.co_freevars)
    result = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    result.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(result, function)
    return result


def _recognise_inside(
    module_class: type[nn.Module], function: types.FunctionType, linears: tuple[str, ...]
) -> Recognised:
    """What a decorator has made of a method, around the rewritten method.

    Nothing else changes if the decorator's function only calls the method or asks for its name.
    """
    inner = function.__wrapped__  # type: ignore[attr-defined]
    cells = _cells(function)
    names = [name for name, cell in cells.items() if _contents(cell) is inner]
    if len(names) != 1 or not _is_only_called(function, names[0]):
        raise NotRecognised(f"its {function.__name__} has a decorator that may do anything")
    found = recognise(module_class, inner, linears)
    knows_itself = any(_contents(cell) is function for cell in cells.values())
    around = _copied(
        function, function.__code__, cells | {names[0]: types.CellType(found.function)}
    )
    return Recognised(around, found.networks, knows_itself or found.knows_itself)


def _is_only_called(function: types.FunctionType, name: str) -> bool:
    """Whether a function does nothing with one of its free variables but call it, by a
    `functools.partial` too, and ask for its name."""
    _, node = _source_of(function)
    parts = [part for statement in node.body for part in ast.walk(statement)]
    harmless: list[Any] = []
    for part in parts:
        if isinstance(part, ast.Call):
            harmless.append(part.func)
            if function.__globals__.get(getattr(part.func, "id", "")) is functools.partial:
                harmless += part.args[:1]
        elif isinstance(part, ast.Attribute) and part.attr in ("__name__", "__qualname__"):
            harmless.append(part.value)
    uses = {id(part) for part in parts if _is_name(part, name)}
    return (
        uses <= set(map(id, harmless))
        and name not in _bound_names(node)
        and _READERS.isdisjoint(_names_in(node))
    )


def _is_name(node: Any, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _names_in(node: ast.AST) -> Iterator[str]:
    """The names in a piece of source, and the names of attributes."""
    for part in ast.walk(node):
        if isinstance(part, (ast.Name, ast.Attribute)):
            yield part.id if isinstance(part, ast.Name) else part.attr


def _bound_names(node: ast.AST) -> list[str]:
    """The names that are bound or declared anywhere in a function, as often as they are."""
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


# -- Networks in the source -------------------------------------------------------------------


class _Step(NamedTuple):
    """A call that the hidden tensor goes through."""

    path: Path
    function: ast.expr  #: as `_relu_mlp_call` takes it
    argument: Any  #: the expression


class _Statements(NamedTuple):
    """A network in statements, and what comes in their place."""

    block: list[ast.stmt]
    start: int
    stop: int
    replacement: list[ast.stmt]
    network: list[Path]


class _Filler(ast.NodeTransformer):
    """Puts pieces of source in the place of names."""

    def __init__(self, parts: dict[str, Any]) -> None:
        self.parts = parts

    def visit_Name(self, node: ast.Name) -> Any:
        return self.parts.get(node.id, node)

    def visit_Expr(self, node: ast.Expr) -> Any:
        part = self.visit(node.value)
        return part if isinstance(part, list) else ast.copy_location(ast.Expr(part), node)


class _Rewriter(ast.NodeTransformer):
    """Finds the networks of a method in its source, and replaces them there."""

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
        self.me = arguments[0].arg if arguments else ""
        self.bound = _bound_names(node)
        self.augmented = {
            id(part.target) for part in ast.walk(node) if isinstance(part, ast.AugAssign)
        }
        self.networks: list[list[Path]] = []

    def rewrite(self) -> list[list[Path]]:
        name = self.function.__name__
        if self.bound.count(self.me) != 1:
            raise NotRecognised(f"its {name} may give the name of its object to something else")
        if self._asks_for_its_class():
            raise NotRecognised(f"its {name} asks for the class of its object")
        if _READERS.isdisjoint(_names_in(self.node)):
            for found in reversed(list(self._in_statements())):
                found.block[found.start : found.stop] = found.replacement
                self.networks.append(found.network)
        self.node.body = [self.visit(statement) for statement in self.node.body]
        return self.networks

    def _asks_for_its_class(self) -> bool:
        """Whether the method may tell the fused class from the one that it is written for."""
        return any(
            (isinstance(part, ast.Attribute) and part.attr == "__class__")
            or (
                isinstance(part, ast.Call)
                and _is_name(part.func, "type")
                and any(_is_name(argument, self.me) for argument in part.args)
            )
            for part in ast.walk(self.node)
        )

    # - Calls

    def visit_Call(self, node: ast.Call) -> ast.AST:
        steps = self._steps(node)
        if not steps or not self._is_network(steps):
            return self.generic_visit(node)
        self.networks.append([step.path for step in steps])
        (call,) = self._filled(
            "ME._relu_mlp_call(ALL, INPUT)",
            node,
            ALL=_tuple_of(steps),
            INPUT=self.visit(steps[0].argument),
        )
        return call.value

    def _filled(self, text: str, where: ast.AST, **parts: Any) -> list[Any]:
        """A piece of source with names replaced by other pieces."""
        tree = ast.parse(text)
        for part in ast.walk(tree):
            ast.copy_location(part, where)
        _Filler({"ME": ast.Name(self.me, ast.Load()), **parts}).visit(tree)
        return tree.body

    def _steps(self, node: Any, hidden: str | None = None) -> list[_Step]:
        """The calls by which an expression comes from the input of the first Linear, or from a
        variable; none if it does not. The first call comes first."""
        steps: list[_Step] = []
        while not _is_name(node, hidden or ""):
            step = self._step(node)
            if step is None:
                return []
            steps.insert(0, step)
            node = step.argument
            if step.path == ("self", self.linears[0]):
                return [] if hidden else steps
        return steps

    def _step(self, node: Any) -> _Step | None:
        if not isinstance(node, ast.Call):
            return None
        callee, arguments, keywords = node.func, node.args, node.keywords
        if not arguments and not keywords:  # h.relu()
            if not isinstance(callee, ast.Attribute) or f".{callee.attr}" not in METHODS:
                return None
            return self._special_step(f".{callee.attr}", callee.value)
        path = self._path(callee)
        if path is None or not arguments or isinstance(arguments[0], ast.Starred):
            return None
        others = [*arguments[1:], *(keyword.value for keyword in keywords)]
        if not others:
            return _Step(path, callee, arguments[0])
        if not all(keyword.arg for keyword in keywords):
            return None
        if not all(isinstance(other, ast.Constant) or self._path(other) for other in others):
            return None
        keys: list[Any] = [ast.Constant(keyword.arg) for keyword in keywords]
        values = [keyword.value for keyword in keywords]
        (call,) = self._filled(
            "ME._relu_mlp_with(FUNCTION, lambda: (ARGUMENTS, KEYWORDS))",
            node,
            FUNCTION=callee,
            ARGUMENTS=ast.Tuple(arguments[1:], ast.Load()),
            KEYWORDS=ast.Dict(keys, values),
        )
        return _Step(path, call.value, arguments[0])

    def _special_step(self, kind: str, argument: ast.expr | None) -> _Step:
        name = f"_relu_mlp_{kind[1:]}"
        function = ast.Attribute(ast.Name(self.me, ast.Load()), name, ast.Load())
        return _Step((kind,), function, argument)

    def _path(self, node: Any) -> Path | None:
        """Dotted names of `self` or of a global variable, whose lookup has no effects."""
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return None
        if node.id != self.me:
            return None if node.id in self.bound else (node.id, *names)
        if not names:
            return None
        return None if is_computed(self.module_class, names[0]) else ("self", *names)

    def _is_network(self, steps: list[_Step], is_whole: bool = True) -> bool:
        """Whether these are all Linears in order, from the first to the last; or without the
        last ones, if `is_whole` is False."""
        positions: dict[Path, int] = {("self", name): n for n, name in enumerate(self.linears)}
        numbers = [positions.get(step.path) for step in steps]
        called = [n for n in numbers if n is not None]
        return (
            numbers[0] == 0
            and called == list(range(len(called)))
            and (len(called) == len(self.linears)) == is_whole
            and (not is_whole or numbers[-1] is not None)
        )

    # - Statements

    def _in_statements(self) -> Iterator[_Statements]:
        parents = {
            child: parent
            for parent in ast.walk(self.node)
            for child in ast.iter_child_nodes(parent)
        }
        for owner in ast.walk(self.node):
            around = [owner]
            while around[-1] is not self.node:
                around.append(parents[around[-1]])
            if any(isinstance(part, (*_SCOPES, ast.Lambda)) for part in around[:-1]):
                continue
            for field in ("body", "orelse", "finalbody"):
                block, start = getattr(owner, field, None), 0
                while isinstance(block, list) and start < len(block):
                    found = self._statements_from(block, start, around)
                    if found is not None:
                        yield found
                    start = start + 1 if found is None else found.stop

    def _statements_from(
        self, block: list[ast.stmt], start: int, around: list[ast.AST]
    ) -> _Statements | None:
        """The network that begins with one of the statements in a block, or None."""
        name, value = _assigned(block[start])
        first = self._steps(value) if name else []
        if not first or not self._is_network(first, is_whole=False):
            return None
        steps, hidden, at = list(first), [name], start
        while True:
            at += 1
            if at == len(block):
                return None
            target, value = _assigned(block[at])
            more = self._steps(value, name) if target else []
            if self._is_cast(block[at], name, steps):
                steps.append(self._special_step(CAST, None))
            elif more and more[-1].path != ("self", self.linears[-1]):
                steps += more
                hidden.append(name := target)
            else:
                break
        last = block[at]
        for call in ast.walk(last):
            more = self._steps(call, name) if isinstance(call, ast.Call) else []
            if more and more[-1].path == ("self", self.linears[-1]):
                break
        else:
            return None
        own = {id(part) for statement in block[start + 1 : at] for part in ast.walk(statement)}
        own.add(id(more[0].argument))
        if (
            not self._is_network([*steps, *more])
            or not self._is_reached(last, call)
            or not all(self._is_unseen(n, own, block[start], last, around) for n in hidden)
        ):
            return None
        functions = ast.Starred(ast.Name("_relu_mlp_functions", ast.Load()), ast.Load())
        output = ast.copy_location(ast.Name("_relu_mlp_output", ast.Load()), call)
        replacement = self._filled(
            _STATEMENTS,
            block[start],
            FIRST=_tuple_of(first),
            INPUT=first[0].argument,
            ALL=_tuple_of([*steps[len(first) :], *more], functions),
            SERVED=[copy.deepcopy(last, {id(call): output})],
            HIDDEN=ast.Name(hidden[0], ast.Store()),
            OTHERS=block[start + 1 : at + 1],
        )
        network = [step.path for step in (*steps, *more)]
        return _Statements(block, start, at + 1, replacement, network)

    def _is_cast(self, statement: ast.stmt, hidden: str, steps: list[_Step]) -> bool:
        """Whether a statement casts the hidden tensor to the dtype of the next Linear."""
        called = sum(step.path in [("self", name) for name in self.linears] for step in steps)
        linear = f"{self.me}.{self.linears[called]}"
        cast = ast.parse(_CAST.format(hidden=hidden, linear=linear)).body[0]
        return (
            ast.dump(statement) == ast.dump(cast)
            and {"torch", "isinstance"}.isdisjoint(self.bound)
            and value_of(self.function, None, ("torch",)) is torch
            and value_of(self.function, None, ("isinstance",)) is isinstance
        )

    def _is_reached(self, node: ast.AST, call: ast.AST) -> bool:
        """Whether what is evaluated in a statement before a call only reads names."""
        if node is call:
            return True
        if isinstance(node, ast.AugAssign) and not isinstance(node.target, ast.Name):
            return False
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)):
            return node.value is not None and self._is_reached(node.value, call)
        kinds = (ast.BinOp, ast.UnaryOp, ast.Call, ast.keyword, ast.Tuple, ast.List)
        if not isinstance(node, kinds):
            return False
        for child in ast.iter_child_nodes(node):
            if any(part is call for part in ast.walk(child)):
                return self._is_reached(child, call)
            if isinstance(child, ast.expr) and not (
                isinstance(child, (ast.Constant, ast.Name)) or self._path(child)
            ):
                return False
        return False

    def _is_unseen(
        self, name: str, own: set[int], first: ast.stmt, last: ast.stmt, around: list[ast.AST]
    ) -> bool:
        """Whether a variable is read only by the network while it holds a hidden tensor.

        Args:
            own: the ids of the nodes of the network's own statements after the first.
            around: the statements that these stand in.
        """
        code = self.function.__code__
        end = first.end_lineno or 0, first.end_col_offset or 0
        is_repeated = any(isinstance(part, _LOOPS) for part in around)
        is_guarded = any(isinstance(part, _GUARDS) for part in around)
        is_read_later = any(
            isinstance(part, ast.Name)
            and part.id == name
            and (not isinstance(part.ctx, ast.Store) or id(part) in self.augmented)
            and id(part) not in own
            and (is_repeated or (part.lineno, part.col_offset) > end)
            for part in ast.walk(self.node)
        )
        is_overwritten = _assigned(last)[0] == name and not is_guarded
        is_local = name in code.co_varnames and name not in code.co_cellvars
        return is_local and (is_overwritten or not is_read_later)


def _assigned(statement: ast.stmt) -> tuple[str, ast.expr | None]:
    """The variable to which a statement assigns, or "", and the value."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign):
        target = statement.target
    else:
        return "", None
    return (target.id if isinstance(target, ast.Name) else ""), statement.value


def _tuple_of(steps: list[_Step], *others: ast.expr) -> ast.Tuple:
    """The functions of some steps, the last first, as a nested call evaluates them."""
    return ast.Tuple([*(step.function for step in reversed(steps)), *others], ast.Load())
