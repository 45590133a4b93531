"""The subclass that a module with a rule gets: one for all modules of a class.

It differs from the class in one method. There, each network that `recognition` finds in
the source of the original is one call of the operators.
"""

from __future__ import annotations

import contextlib
import functools
import types
from typing import Any, NamedTuple

from torch import nn

from . import calls
from .recognition import NotRecognized, RecognizedMethod, recognize
from .rules import Rule, rule_for


class FusedModule:
    """The common base of all classes that are made for rules."""

    #: The class that the module had. `unfuse` restores it.
    _relu_mlp_original: type[nn.Module]

    # Rewritten methods use these names.
    _relu_mlp_try = staticmethod(calls.call_fused)
    _relu_mlp_natively = staticmethod(calls.call_natively)
    _relu_mlp_call = staticmethod(calls.call)
    _relu_mlp_with = calls.WithArguments
    _relu_mlp_relu = staticmethod(calls.call_relu)
    _relu_mlp_relu_ = staticmethod(calls.call_relu_)
    _relu_mlp_cast = staticmethod(calls.cast)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle finds a class by its name, and only the original class has one.
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        function, arguments, *state = reduced
        if arguments[:1] == (type(self),):
            function, arguments = new_module, (type(self)._relu_mlp_original, *arguments[1:])
        return (function, arguments, *state)


def new_module(original: type[nn.Module], *arguments: Any) -> nn.Module:
    """A fused module without its state, for pickle; an unfused one if it can't be fused here."""
    module_class, rule = original, rule_for(original)
    if rule is not None:
        with contextlib.suppress(NotRecognized):
            module_class = fused_class(original, rule)
    return module_class.__new__(module_class, *arguments)


class _Fusion(NamedTuple):
    module_class: type[nn.Module]
    method: RecognizedMethod


def fused_class(original: type[nn.Module], rule: Rule) -> type[nn.Module]:
    """The subclass of a class of modules that follows a rule.

    Raises:
        NotRecognized: if there can't be one.
    """
    return _fusion_of(original, rule).module_class


def fused_method(original: type[nn.Module], rule: Rule) -> RecognizedMethod:
    """The method of `fused_class` that differs from the original.

    Raises:
        NotRecognized: if there can't be one.
    """
    return _fusion_of(original, rule).method


#: By class, rule and method: the fused class, or the reason why there is none.
_fusions: dict[tuple[type[nn.Module], Rule, Any], _Fusion | str] = {}


def _fusion_of(original: type[nn.Module], rule: Rule) -> _Fusion:
    key = (original, rule, getattr(original, rule.method, None))
    if key not in _fusions:
        try:
            made: _Fusion | str = _make_fusion(*key)
        except NotRecognized as reason:
            made = str(reason)
        _fusions.setdefault(key, made)  # if two threads make one, both get the same
    fusion = _fusions[key]
    if isinstance(fusion, str):
        raise NotRecognized(fusion)
    return fusion


def _make_fusion(original: type[nn.Module], rule: Rule, known: Any) -> _Fusion:
    recognized = recognize(original, known, rule.linears)

    @functools.wraps(known)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Looked up in every call, because somebody may have replaced it.
        current = getattr(original, rule.method)
        return (recognized.function if current is known else current)(self, *args, **kwargs)

    namespace = {
        rule.method: method,
        "_relu_mlp_original": original,
        "__doc__": f"A {original.__name__} whose {', '.join(rule.linears)} are one operator.",
        # torch.fx treats the layers of torch.nn as leaves, and identifies them by this name.
        "__module__": original.__module__,
    }
    name = f"Fused{original.__name__}"
    try:
        made = types.new_class(name, (FusedModule, original), {}, lambda ns: ns.update(namespace))
    except Exception as error:
        raise NotRecognized(f"its class can't have a subclass: {error}") from error
    if recognized.knows_itself and made.__dict__[rule.method] is method:
        # The decorator's function may check whether it is the method of its object, and here it
        # is not. (A class that decorates methods itself has decorated this one again.)
        raise NotRecognized(f"its {rule.method} has a decorator that may do anything")
    return _Fusion(made, recognized)
