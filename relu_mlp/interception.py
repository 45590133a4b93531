"""Whether something intercepts the native layers' calls; then the native layers run.

The operators give the same numbers, but they call no `F.linear`. So nothing is fused where a
function or a method that the native layers call has been replaced, or where a mode is active
that would see their calls. For users this is in docs/compatibility.md, "Under modes".
"""

from __future__ import annotations

import functools
from operator import attrgetter
from types import BuiltinFunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn import Dropout, Identity, Linear, Module, ReLU, Sequential

from ._torch_private import (
    CALL_IMPL,
    GLOBAL_BACKWARD_HOOKS,
    GLOBAL_BACKWARD_PRE_HOOKS,
    GLOBAL_FORWARD_HOOKS,
    GLOBAL_FORWARD_PRE_HOOKS,
    MODES_FOR_OPERATORS,
    TRACER_OF_FX,
    call_impl_of,
    constant_in_a_graph,
    dispatch_mode_at,
    function_mode_at,
    len_dispatch_modes,
    len_function_modes,
)
from .activations import DEFAULTS, FUNCTIONS, OUTPUT_ACTIVATIONS

# -- Modes -------------------------------------------------------------------------------------


#: The number of active function modes. It is a C function.
function_modes = len_function_modes


@constant_in_a_graph  # the compiler compiles nothing under a mode, and does not know the function
def dispatch_modes() -> int:
    """The number of active dispatch modes."""
    return len_dispatch_modes()


def is_under_a_mode() -> bool:
    """Whether a mode is active that has to see the native layers.

    Those of `MODES_FOR_OPERATORS` need not see them, nor a mode with a true attribute
    `understands_relu_mlp`.
    """
    for position in range(function_modes()):
        if not _understands(function_mode_at(position)):
            return True
    return not all(_understands(dispatch_mode_at(n)) for n in range(dispatch_modes()))


def _understands(mode: Any) -> bool:
    return type(mode).__module__ in MODES_FOR_OPERATORS or getattr(
        mode, "understands_relu_mlp", False
    )


# -- Replaced functions and methods --------------------------------------------------------------
#
# Comparing whole tuples takes a third of the steps of a chain of comparisons. For torch.compile the
# answers are constants. Otherwise it would compare every item again in every call.

_MODULE, _LINEAR, _RELU = vars(Module), vars(Linear), vars(ReLU)

#: A class with one of these changes its modules' behavior, although `forward` is the same. Module
#: itself has the methods.
_ATTRIBUTES = frozenset({"weight", "bias", "inplace", "__getattribute__"})
_METHODS = frozenset({"__call__", CALL_IMPL, "__getattr__"})


#: From `torch` to the functions that output activations call.
_output_functions = attrgetter(*FUNCTIONS.values())


def _functions() -> tuple[Any, ...]:
    """The functions that a network of functions calls."""
    return F.linear, F.relu, *_output_functions(torch)


def _layers() -> tuple[Any, ...]:
    """The functions that a network of layers calls, and the numbers of its classes' attributes."""
    return (
        Sequential.forward,
        Module.__call__,
        call_impl_of(Module),
        Module.__getattr__,
        Linear.forward,
        ReLU.forward,
        F.linear,
        F.relu,
        torch.relu,
        torch.relu_,
        len(_MODULE),
        len(_LINEAR),
        len(_RELU),
    )


#: Where `_layers` finds its functions.
_OWNERS: tuple[tuple[Any, str], ...] = (
    (Sequential, "forward"),
    (Module, "__call__"),
    (Module, CALL_IMPL),
    (Module, "__getattr__"),
    (Linear, "forward"),
    (ReLU, "forward"),
    (F, "linear"),
    (F, "relu"),
    (torch, "relu"),
    (torch, "relu_"),
)


def _output_activation(kind: type[Module]) -> tuple[Any, ...]:
    """The functions that calling a module of an output activation calls."""
    return kind.forward, kind.__call__, call_impl_of(kind), *_output_functions(torch)


def _by_pytorch(code: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same items, but each one that is not PyTorch's own is an object that equals nothing."""
    return tuple(item if _is_by_pytorch(item) else object() for item in code)


def _is_by_pytorch(item: Any) -> bool:
    if isinstance(item, (int, BuiltinFunctionType)):
        return True
    home = _home_of(item)
    return home.startswith("torch.") and not home.startswith("torch.fx.")


def _home_of(function: Any) -> str:
    """The module that defines a function. A wrapper's `__module__` may name another one."""
    return str(getattr(function, "__globals__", {}).get("__name__"))


def _do_classes_override() -> bool:
    return not (
        _ATTRIBUTES.isdisjoint(_MODULE)
        and (_ATTRIBUTES | _METHODS).isdisjoint(_LINEAR)
        and (_ATTRIBUTES | _METHODS).isdisjoint(_RELU)
    )


#: How a Sequential iterates over its children. A subclass may do it differently.
(iterate,) = _by_pytorch((Sequential.__iter__,))

_FUNCTIONS = _by_pytorch(_functions())
_LAYERS = () if _do_classes_override() else _by_pytorch(_layers())
_OUTPUT_ACTIVATIONS: dict[type[Module], tuple[Any, ...]] = {
    kind: _by_pytorch(_output_activation(kind)) for kind in OUTPUT_ACTIVATIONS if kind is not ReLU
}


@constant_in_a_graph
def are_functions_replaced() -> bool:
    """Whether a function of PyTorch that a network calls is not PyTorch's own."""
    return _functions() != _FUNCTIONS


@constant_in_a_graph
def are_layers_replaced() -> bool:
    """Whether a call of Linear, ReLU or Sequential does anything that PyTorch does not define.

    This includes global hooks.
    """
    if (
        GLOBAL_FORWARD_HOOKS
        or GLOBAL_FORWARD_PRE_HOOKS
        or GLOBAL_BACKWARD_HOOKS
        or GLOBAL_BACKWARD_PRE_HOOKS
    ):
        return True
    layers = _layers()
    # Classes may get more attributes, as long as these do not matter.
    return layers != _LAYERS and (_is_replaced(layers[:-3], _LAYERS[:-3]) or _do_classes_override())


@constant_in_a_graph
def is_output_activation_replaced(kind: type[Module]) -> bool:
    """Whether a call of an output activation's module does more than PyTorch defines."""
    code, known = _output_activation(kind), _OUTPUT_ACTIVATIONS[kind]
    return code != known and _is_replaced(code, known)


def _is_replaced(code: tuple[Any, ...], known: tuple[Any, ...]) -> bool:
    # To record a graph of operations, PyTorch wraps methods of Module, but records no modules.
    wrapper = TRACER_OF_FX if dispatch_modes() else None
    return len(code) != len(known) or any(
        item is not original and _home_of(item) != wrapper
        for item, original in zip(code, known, strict=True)
    )


# -- The same for the native node ----------------------------------------------------------------


def originals() -> dict[str, Any]:
    """What csrc/autograd/children.cpp compares in every call: entries of its struct `Known`."""
    layers = _LAYERS[:-3] or tuple(object() for _ in _OWNERS)
    return {
        "iter": "__iter__",
        "iterate": iterate,
        "are_layers_replaced": are_layers_replaced,
        "is_output_activation_replaced": is_output_activation_replaced,
        "global_hooks": (
            GLOBAL_FORWARD_HOOKS,
            GLOBAL_FORWARD_PRE_HOOKS,
            GLOBAL_BACKWARD_HOOKS,
            GLOBAL_BACKWARD_PRE_HOOKS,
        ),
        "layers": (
            tuple((*owner, item) for owner, item in zip(_OWNERS, layers, strict=True)),
            (Module, Linear, ReLU),
        ),
        "identity": Identity,
        "identity_originals": (_entries(*_IDENTITY), (Module, Identity)),
        "dropout": Dropout,
        "dropout_originals": (_entries(*_DROPOUT), (Module, Dropout)),
        "output_activations": tuple(
            (kind, OUTPUT_ACTIVATIONS[kind], (_attributes_of(kind), (Module, kind)))
            for kind in _OUTPUT_ACTIVATIONS
            if kind not in DEFAULTS
        ),
    }


#: What the classes that may do nothing call (fusion/conditions.py).
_IDENTITY = ((Identity, "forward"), (Module, "__call__"), (Module, CALL_IMPL))
_DROPOUT = ((Dropout, "forward"), (Module, "__call__"), (Module, CALL_IMPL), (F, "dropout"))


def _entries(*owners: tuple[Any, str]) -> tuple[tuple[Any, str, Any], ...]:
    """(owner, name, value) for each; no value equals one that is not PyTorch's own."""
    values = _by_pytorch(tuple(vars(owner).get(name) for owner, name in owners))
    return tuple((*owner, value) for owner, value in zip(owners, values, strict=True))


def _attributes_of(kind: type[Module]) -> tuple[tuple[Any, str, Any], ...]:
    """What `_output_activation` reads, as (owner, name, value)."""
    owners: list[tuple[Any, str]] = [(kind, "forward"), (Module, "__call__"), (Module, CALL_IMPL)]
    for path in FUNCTIONS.values():
        *parents, name = path.split(".")
        owners.append((functools.reduce(getattr, parents, torch), name))
    return tuple(
        (*owner, item) for owner, item in zip(owners, _OUTPUT_ACTIVATIONS[kind], strict=True)
    )
