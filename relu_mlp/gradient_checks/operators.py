"""Functions that bring their derivative along: an autograd.Function, an operator of
torch.library, a module. They are checked by handing them over."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch_private import schema_of_overload
from .arguments import Inputs, as_tensor


class Subject(NamedTuple):
    """A function whose derivative is to be checked."""

    name: str
    function: Callable[..., Tensor]  #: of all inputs, in their order, to a tensor of one element
    outputs: Callable[..., list[Tensor]]  #: to all outputs of floating point
    inputs: dict[str, Tensor]


def subject_of(handed_over: Any, inputs: Inputs) -> Subject:
    """What was handed over, as a function of tensors.

    Where it returns more than one number, each is multiplied by a random one, the gradient that
    arrives, and they are summed.
    """
    handed_over = packet_of(handed_over)
    if isinstance(handed_over, torch.nn.Module):
        call, named = _of_module(handed_over, inputs)
    else:
        call, named = _of_callable(handed_over, inputs)

    def outputs(*tensors: Tensor) -> list[Tensor]:
        return [out for out in flattened(call(*tensors)) if out.is_floating_point()]

    def function(*tensors: Tensor) -> Tensor:
        found = outputs(*tensors)
        if len(found) == 1 and found[0].numel() == 1:
            return found[0]
        if not found:
            raise TypeError("the function must return a Tensor of floating point, got none")
        return weighted_sum(found)

    return Subject(name_of(handed_over), function, outputs, named)


def arriving(outputs: Sequence[Tensor]) -> list[Tensor]:
    """A gradient that arrives at each output: the same numbers at each call, between -1 and 1 and
    without a pattern. (Random ones are refused inside vmap.)"""
    found = []
    for out in outputs:
        count = torch.arange(1, out.numel() + 1, dtype=torch.float64, device=out.device)
        found.append((2 * torch.frac(count.sin().abs() * 43758.5453) - 1).view(out.shape))
    return found


def weighted_sum(outputs: Sequence[Tensor]) -> Tensor:
    """A number that depends on every element of the outputs in another way."""
    weights = arriving(outputs)
    terms = [(out * weight).sum() for out, weight in zip(outputs, weights, strict=True)]
    return torch.stack(terms).sum()


def flattened(result: Any) -> list[Tensor]:
    """The tensors in what a function returned, in their order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, (list, tuple)):
        return [tensor for each in result for tensor in flattened(each)]
    return []


def name_of(handed_over: Any) -> str:
    if isinstance(handed_over, torch.nn.Module):
        return type(handed_over).__name__
    owner = getattr(handed_over, "__self__", None)
    if getattr(handed_over, "__name__", "") == "apply" and inspect.isclass(owner):
        return owner.__name__
    return str(getattr(handed_over, "__name__", type(handed_over).__name__))


def packet_of(handed_over: Any) -> Any:
    """The operator of what torch.library.custom_op returned; anything else as it is."""
    found = re.fullmatch(r"<CustomOpDef\((\w+)::(\w+)\)>", str(handed_over))
    return getattr(getattr(torch.ops, found[1]), found[2]) if found else handed_over


def _of_module(
    module: torch.nn.Module, inputs: Inputs
) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """A module as a function of its inputs and parameters."""
    by_name = isinstance(inputs, Mapping)
    given = given_by_name(module.forward, inputs)
    of_inputs = {name: as_tensor(name, value) for name, value in given.items()}
    parameters = {
        f"{name} (parameter)" if name in of_inputs else name: parameter.detach()
        for name, parameter in module.named_parameters()
    }
    own_names = [name for name, _ in module.named_parameters()]
    buffers = dict(module.named_buffers())

    def call(*tensors: Tensor) -> Any:
        arguments, of_parameters = tensors[: len(of_inputs)], tensors[len(of_inputs) :]
        state = dict(zip(own_names, of_parameters, strict=True))
        for name, buffer in buffers.items():  # copies: a batch norm writes to them
            is_real = buffer.is_floating_point()
            state[name] = buffer.detach().double().clone() if is_real else buffer.clone()
        if by_name:
            named = dict(zip(of_inputs, arguments, strict=True))
            return torch.func.functional_call(module, state, (), named)
        return torch.func.functional_call(module, state, tuple(arguments))

    return call, of_inputs | parameters


def _of_callable(handed_over: Any, inputs: Inputs) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """An operator or another function. Arguments that are no tensors are held fixed."""
    called = handed_over
    if inspect.isclass(handed_over) and issubclass(handed_over, torch.autograd.Function):
        called = handed_over.apply
    by_name = isinstance(inputs, Mapping)
    given = given_by_name(handed_over, inputs)
    named, fixed = {}, {}
    for name, value in given.items():
        try:
            named[name] = as_tensor(name, value)
        except TypeError:
            fixed[name] = value

    def call(*tensors: Tensor) -> Any:
        all_of_them = {**fixed, **dict(zip(named, tensors, strict=True))}
        ordered = {name: all_of_them[name] for name in given}
        return called(**ordered) if by_name else called(*ordered.values())

    return call, named


def given_by_name(function: Any, inputs: Inputs) -> dict[str, Any]:
    """The arguments by name."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    if not isinstance(inputs, Sequence) or isinstance(inputs, str):
        raise TypeError(
            f"inputs must be a sequence or mapping of Tensors, got {type(inputs).__name__}"
        )
    return dict(zip(argument_names(function, inputs), inputs, strict=True))


def argument_names(handed_over: Any, inputs: Iterable[Any]) -> list[str]:
    """The names of a function's arguments, or their places."""
    count = len(list(inputs))
    operator = handed_over
    if hasattr(handed_over, "overloads"):
        operator = getattr(handed_over, handed_over.overloads()[0])
    schema = schema_of_overload(operator)
    if hasattr(schema, "arguments"):
        return [argument.name for argument in schema.arguments][:count]
    owner = getattr(handed_over, "__self__", handed_over)
    is_function = inspect.isclass(owner) and issubclass(owner, torch.autograd.Function)
    plain = owner.forward if is_function else handed_over
    with suppress(TypeError, ValueError):
        parameters = list(inspect.signature(plain).parameters.values())
        names = [
            each.name
            for each in parameters
            if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        ]
        if is_function and owner.setup_context is torch.autograd.Function.setup_context:
            names = names[1:]  # ctx
        if len(names) >= count:
            return names[:count]
    return [f"inputs[{n}]" for n in range(count)]
