"""Whether somebody sees or changes what the native layers do; then the native layers run.

The operators give the same numbers, but they call no `F.linear`. So where a function or a
method has been replaced that the native layers would call, or a mode is active that would see
their calls, nothing is fused. docs/compatibility.md, "Under modes", says it for people.
"""

from __future__ import annotations

from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.nn import Linear, Module, ReLU, Sequential, Sigmoid, Tanh
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_in_a_graph(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, which would import the compiler.

    What the function reads is not compared again in every call of a compiled function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# -- Modes -------------------------------------------------------------------------------------


def _private(name: str) -> Callable[..., Any]:
    """A function of torch._C; should a PyTorch lack it, no mode is seen there."""
    return getattr(torch._C, name, lambda *_: 0)


_function_mode_at = _private("_get_function_stack_at")
_dispatch_mode_at = _private("_get_dispatch_stack_at")
_len_torch_dispatch_stack = _private("_len_torch_dispatch_stack")

#: How many function modes are active, in C.
function_modes = _private("_len_torch_function_stack")


@constant_in_a_graph  # the compiler compiles nothing under a mode, and does not know the function
def dispatch_modes() -> int:
    """How many dispatch modes are active."""
    return _len_torch_dispatch_stack()


#: Where the modes are defined to which an operator may be shown in place of the layers: the one
#: of the default device, those by which PyTorch records graphs, and its counter of operations,
#: which has formulas for the operators (flops.py).
_MODULES = frozenset(
    {
        "torch.utils._device",
        "torch._subclasses.fake_tensor",
        "torch._subclasses.functional_tensor",
        "torch.fx.experimental.proxy_tensor",
        "torch._export.non_strict_utils",
        "torch.export._safeguard",
        "torch.utils.flop_counter",
    }
)


def is_under_a_mode() -> bool:
    """Whether a mode is active that has to see the native layers.

    Not one of `_MODULES`, nor one that has an attribute `understands_relu_mlp` that is true.
    """
    for position in range(function_modes()):
        if not _understands(_function_mode_at(position)):
            return True
    return not all(_understands(_dispatch_mode_at(n)) for n in range(dispatch_modes()))


def _understands(mode: Any) -> bool:
    return type(mode).__module__ in _MODULES or getattr(mode, "understands_relu_mlp", False)


# -- What somebody has replaced -----------------------------------------------------------------
#
# Tuples are compared as wholes, which takes a third of the steps of a chain of comparisons. To
# torch.compile the answers are constants: it would compare every item again in every call.

_MODULE, _LINEAR, _RELU = vars(Module), vars(Linear), vars(ReLU)

#: What a class has to have for its modules to do something else by the same `forward`. Module
#: itself has the methods.
_ATTRIBUTES = frozenset({"weight", "bias", "inplace", "__getattribute__"})
_METHODS = frozenset({"__call__", "_call_impl", "__getattr__"})


def _functions() -> tuple[Any, ...]:
    """What a network of functions calls."""
    return F.linear, F.relu, torch.relu, torch.sigmoid, torch.tanh


def _layers() -> tuple[Any, ...]:
    """What a network of layers calls, and how many attributes their classes have."""
    return (
        Sequential.forward,
        Module.__call__,
        Module._call_impl,
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


def _output_activation(kind: type[Module]) -> tuple[Any, ...]:
    """What a Sigmoid or a Tanh calls."""
    return kind.forward, kind.__call__, kind._call_impl, torch.sigmoid, torch.tanh


def _by_pytorch(code: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same, but something that equals nothing for what somebody had replaced before."""
    return tuple(item if _is_by_pytorch(item) else object() for item in code)


def _is_by_pytorch(item: Any) -> bool:
    if isinstance(item, (int, BuiltinFunctionType)):
        return True
    home = _home_of(item)
    return home.startswith("torch.") and not home.startswith("torch.fx.")


def _home_of(function: Any) -> str:
    """The module in which a function is written; a wrapper's `__module__` may name another."""
    return str(getattr(function, "__globals__", {}).get("__name__"))


def _is_something_in_the_way() -> bool:
    return not (
        _ATTRIBUTES.isdisjoint(_MODULE)
        and (_ATTRIBUTES | _METHODS).isdisjoint(_LINEAR)
        and (_ATTRIBUTES | _METHODS).isdisjoint(_RELU)
    )


#: How a Sequential goes through its children, which a subclass may do otherwise.
(iterate,) = _by_pytorch((Sequential.__iter__,))

_FUNCTIONS = _by_pytorch(_functions())
_LAYERS = () if _is_something_in_the_way() else _by_pytorch(_layers())
_OUTPUT_ACTIVATIONS: dict[type[Module], tuple[Any, ...]] = {
    kind: _by_pytorch(_output_activation(kind)) for kind in (Sigmoid, Tanh)
}


@constant_in_a_graph
def are_functions_replaced() -> bool:
    """Whether a function of PyTorch that a network calls is not PyTorch's own."""
    return _functions() != _FUNCTIONS


@constant_in_a_graph
def are_layers_replaced() -> bool:
    """Whether calling Linear, ReLU and Sequential does anything else than PyTorch defines.

    That includes the hooks for all modules at once.
    """
    if (
        _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    ):
        return True
    layers = _layers()
    # Classes may get more attributes, if these do not matter.
    return layers != _LAYERS and (
        _is_replaced(layers[:-3], _LAYERS[:-3]) or _is_something_in_the_way()
    )


@constant_in_a_graph
def is_output_activation_replaced(kind: type[Module]) -> bool:
    """Whether calling a Sigmoid or a Tanh does anything else than PyTorch defines."""
    code, known = _output_activation(kind), _OUTPUT_ACTIVATIONS[kind]
    return code != known and _is_replaced(code, known)


def _is_replaced(code: tuple[Any, ...], known: tuple[Any, ...]) -> bool:
    # To record a graph of operations, PyTorch wraps methods of Module, but records no modules.
    wrapper = "torch.fx._symbolic_trace" if dispatch_modes() else None
    return len(code) != len(known) or any(
        item is not original and _home_of(item) != wrapper
        for item, original in zip(code, known, strict=True)
    )
