"""Rules for `fuse`: which Linears of a module of a given class are one network.

A module whose class has a rule gets a subclass of that class, which differs in one
method: there, what `recognition` finds in the source of the original to be one network
is one call of the operators. A method in which it finds none is left as it is.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .checks import DTYPES
from .functional import call_operators, is_plain, is_served, leaves_python
from .interception import are_layers_replaced
from .recognition import (
    CAST,
    METHODS,
    NotRecognised,
    Path,
    Recognised,
    is_computed,
    recognise,
    value_of,
)
from .run import Run, find_run, is_patched

#: What is ReLU when it is called as a function.
RELUS = (F.relu, torch.relu, torch.relu_)
_relu = F.relu  # the only one that takes an argument: whether to work in place
_relu_methods = Tensor.relu, Tensor.relu_

#: Stands for an activation that is a function, and carries no hooks.
_RELU = nn.ReLU()

_dropout = F.dropout
_dropout_forward = nn.Dropout.forward
_identity_forward = nn.Identity.forward


class Rule(NamedTuple):
    """The arguments of `register_fusion`."""

    linears: tuple[str, ...]
    activation: str | None
    dropout: str | None
    method: str


#: By class, or by its path: a package need not be imported for its rule.
_rules: dict[type[nn.Module] | str, Rule] = {}


def register_fusion(
    module_class: type[nn.Module] | str,
    linears: Iterable[str],
    *,
    activation: str | None = None,
    dropout: str | None = None,
    method: str = "forward",
) -> None:
    """Tells `fuse` which Linears of a class of modules are one ReLU network.

    It is meant for a method that computes, among other things::

        h = self.fc1(x)
        h = F.relu(h)           # or self.activation(h)
        h = self.dropout(h)     # or none, or F.dropout(...)
        y = self.fc2(h)

    or the same in fewer statements, ``y = x + self.fc2(F.relu(self.fc1(x)))``. There may
    be more than two Linears. `fuse` reads the source of the method, and serves what it
    recognises whole: calls of these Linears in this order, with nothing but ReLU and
    dropout in between, and hidden values that nothing else can see. Around that there may
    be anything. A method without such calls, or whose source is not at hand, is left as
    it is, and the report says why. In every call it is seen whether the Linears and the
    functions between them are still what they were; if not, they are called one by one.

    Registering a class again replaces its rule for what is fused from then on.

    Args:
        module_class: the class, or its path as text, such as
            ``"package.module.Class"``; then nothing is imported. Subclasses have other
            methods, perhaps, and need a rule of their own.
        linears: the names of two or more children, in the order of the calls.
        activation: an attribute that has to hold the ReLU, an `nn.ReLU` or the function,
            for a module to be fused; None if the method calls `F.relu`, `torch.relu` or
            `h.relu()`.
        dropout: a child that has to be an `nn.Dropout`; None if there is none, or the
            method calls `F.dropout`.
        method: the method that calls the Linears.

    Raises:
        TypeError: if `module_class` is no subclass of `nn.Module` and no text, or a
            name is no text.
        ValueError: if there are fewer than two names in `linears`, one of them twice,
            or the class has no such method.

    Example::

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc1, self.fc2 = nn.Linear(64, 256), nn.Linear(256, 64)

            def forward(self, x):
                return x + self.fc2(F.relu(self.fc1(x)))

        relu_mlp.register_fusion(Block, ["fc1", "fc2"])
    """
    is_path = isinstance(module_class, str)
    if not is_path and not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise TypeError(
            "module_class must be a subclass of nn.Module or its path as text, "
            f"got {module_class!r}"
        )
    # Text is iterable too, but would fall into its letters.
    if isinstance(linears, str) or not isinstance(linears, Iterable):
        raise TypeError(f"linears must be a sequence of names, got {linears!r}")
    names = tuple(linears)
    named = {f"linears[{n}]": name for n, name in enumerate(names)}
    optional = {"activation": activation, "dropout": dropout}
    named |= {argument: name for argument, name in optional.items() if name is not None}
    for argument, name in (named | {"method": method}).items():
        if not isinstance(name, str):
            raise TypeError(f"{argument} must be a name as text, got {name!r}")
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"linears must be two or more different names, got {list(names)}")
    if not is_path and not callable(getattr(module_class, method, None)):
        raise ValueError(f"method must name one of {module_class}, got {method!r}")
    _rules[module_class] = Rule(names, activation, dropout, method)


def rule_for(module_class: type[nn.Module]) -> Rule | None:
    """The rule of exactly this class."""
    return _rules.get(module_class) or _rules.get(path_of(module_class))


def path_of(module_class: type) -> str:
    """Where a class is found, as text."""
    return f"{module_class.__module__}.{module_class.__qualname__}"


# -- What is untouched, and what is not ----------------------------------------------------


def does_nothing(child: nn.Module) -> bool:
    """Whether calling it returns its input: Identity, and Dropout in eval mode or of p = 0."""
    if type(child).__call__ is not nn.Module.__call__ or is_patched(child.__dict__):
        return False
    if type(child) is nn.Dropout:
        return (
            (not child.training or child.p == 0)
            and 0 <= child.p <= 1  # else it raises
            and nn.Dropout.forward is _dropout_forward
            and F.dropout is _dropout
        )
    return type(child) is nn.Identity and nn.Identity.forward is _identity_forward


def may_do_nothing(child: nn.Module) -> bool:
    """Whether it is one of those that `does_nothing` may be true of, perhaps in another mode."""
    return type(child) in (nn.Dropout, nn.Identity) and not is_patched(child.__dict__)


def is_linear_like(child: Any) -> bool:
    """Whether it is a Linear, of PyTorch or of somebody else."""
    return isinstance(child, nn.Linear) or (
        isinstance(child, nn.Module) and type(child).__name__.endswith("Linear")
    )


def problem_of(child: Any) -> str | None:
    """What keeps a Linear, an activation or a dropout from being fused, or None."""
    if isinstance(child, nn.Module) and is_patched(child.__dict__):
        return "has a forward of its own" if "forward" in child.__dict__ else "carries a hook"
    if not isinstance(child, nn.Linear):
        if is_linear_like(child):
            return f"is no nn.Linear but a {path_of(type(child))}"
        return None
    if hasattr(child, "parametrizations"):
        return "is parametrized"
    if type(child) is not nn.Linear:
        return "is a subclass of Linear"
    for name in ("weight", "bias"):
        tensor: Any = getattr(child, name, None)
        if tensor is None and name == "bias":
            continue
        if not is_plain(tensor):
            return f"has a {name} that is a {type(tensor).__name__}, no dense Parameter"
        if tensor.dtype not in DTYPES:
            return f"has a {name} of {tensor.dtype}"
    return None


def _is_relu(function: Any) -> bool:
    return type(function) is nn.ReLU or any(function is relu for relu in RELUS)


def reason_to_leave(module: nn.Module, rule: Rule) -> str | None:
    """Why a module is not what its rule expects, or None."""
    if rule.method in module.__dict__:
        return f"has a {rule.method} of its own"
    if not callable(getattr(type(module), rule.method, None)):
        return f"has no {rule.method}, which its rule names"
    names = filter(None, (*rule.linears, rule.activation, rule.dropout))
    named = {name: _attribute(module, name) for name in names}
    for name in rule.linears:
        linear = named[name]
        if not isinstance(linear, nn.Linear):
            return f"its {name} is no Linear but {_described(linear)}"
        if problem := problem_of(linear):
            return f"its {name} {problem}"
    for name in filter(None, (rule.activation, rule.dropout)):
        if problem := problem_of(named[name]):
            return f"its {name} {problem}"
    if rule.activation is not None and not _is_relu(named[rule.activation]):
        return f"its {rule.activation} is {_described(named[rule.activation])}"
    if rule.dropout is not None:
        dropout = named[rule.dropout]
        if not isinstance(dropout, nn.Module) or not may_do_nothing(dropout):
            return f"its {rule.dropout} is no Dropout but {_described(dropout)}"
    try:
        found = _fusion_of(type(module), rule).recognised
    except NotRecognised as reason:
        return str(reason)
    reasons = [_problem_between(module, rule, found, network) for network in found.networks]
    return None if None in reasons else reasons[0]


def _attribute(module: nn.Module, name: str) -> Any:
    """An attribute; the property itself if it is one, for to ask it may have effects."""
    if is_computed(type(module), name):
        return inspect.getattr_static(type(module), name)
    return getattr(module, name, None)


def _problem_between(
    module: nn.Module, rule: Rule, found: Recognised, network: list[Path]
) -> str | None:
    """What in a network that a method calls is neither Linear nor ReLU nor dropout, or None."""
    is_activated = True
    for path in network:
        if path[0] == "self" and path[1] in rule.linears:
            if not is_activated:
                return f"its {rule.method} calls no ReLU before {path[1]}"
            is_activated = False
        elif path[0] in METHODS:
            is_activated = True
        elif path[0] != CAST:
            function = value_of(found.function, module, path)
            if problem := problem_of(function):
                return f"its {path[-1]} {problem}"
            if _is_relu(function):
                is_activated = True
            elif function is not _dropout and not may_do_nothing(function):
                return f"its {rule.method} calls {path[-1]}, which is {_described(function)}"
    return None


def dropouts_of(module: nn.Module, rule: Rule) -> list[Any]:
    """The dropouts in the networks of a module that `reason_to_leave` finds nothing against."""
    found = _fusion_of(type(module), rule).recognised
    values = [
        value_of(found.function, module, path) for network in found.networks for path in network
    ]
    return [value for value in values if value is _dropout or type(value) is nn.Dropout]


def _described(value: Any) -> str:
    if isinstance(value, nn.Module):
        return type(value).__name__
    return getattr(value, "__name__", "None" if value is None else f"a {type(value).__name__}")


# -- A call ------------------------------------------------------------------------------


class _With:
    """A function with arguments besides the first, which are evaluated when it is called."""

    def __init__(self, function: Any, others: Callable[[], tuple[Any, Any]]) -> None:
        self.function = function
        self.others = others

    def __call__(self, input: Any) -> Any:
        arguments, keywords = self.others()
        return self.function(input, *arguments, **keywords)


def _call_relu(input: Any) -> Any:
    return input.relu()


def _call_relu_(input: Any) -> Any:
    return input.relu_()


def _cast(input: Any) -> Any:
    """Stands for a cast to the dtype of the next weight. It is only looked at, not called."""
    raise NotImplementedError


def _run_of(functions: tuple[Any, ...], x: Any) -> Run | None:
    """The network that calling these functions is, the last first; None if it is none for the
    operators, now and for this x."""
    if leaves_python() or not is_served(x) or are_layers_replaced():
        return None
    chain: list[nn.Module] = []
    is_cast = False
    for function in reversed(functions):
        if type(function) is nn.Linear or type(function) is nn.ReLU:
            chain.append(function)
        elif function is _call_relu or function is _call_relu_:
            if _relu_methods != (Tensor.relu, Tensor.relu_):
                return None
            chain.append(_RELU)
        elif _is_relu(function):
            chain.append(_RELU)
        elif type(function) is _With:
            arguments, keywords = function.others()
            if function.function is _relu:
                _takes_inplace(*arguments, **keywords)
                chain.append(_RELU)
            elif function.function is not _dropout or _drops(*arguments, **keywords):
                return None
        elif function is _cast:
            is_cast = True
        elif not isinstance(function, nn.Module) or not does_nothing(function):
            return None
    run = find_run(chain)
    if run is None or len(run.children) < len(chain):
        return None
    if is_cast and not _casts_nothing(x, run):
        return None
    functional.check_empty_biases(run.weights, run.biases)
    return run


def _drops(p: Any = 0.5, training: Any = True, inplace: Any = False) -> bool:
    """Whether `F.dropout` with these arguments does not return its input."""
    return not 0 <= p <= 1 or (training and p != 0)


def _takes_inplace(inplace: Any = False) -> None:
    """TypeError where `F.relu` raises it."""


def _casts_nothing(x: Tensor, run: Run) -> bool:
    """Whether it makes no difference if a hidden tensor is cast to its next weight's dtype.

    It does not if it has that dtype. Under autocast the Linear casts it back, and all that it
    was is left if the dtype in between is float32.
    """
    dtypes = {weight.dtype for weight in run.weights}
    device = x.device.type
    is_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if is_autocast and torch.float64 not in {x.dtype, *dtypes}:
        return dtypes <= {torch.float32, torch.get_autocast_dtype(device)}
    return dtypes == {x.dtype}


# -- The classes -------------------------------------------------------------------------


class FusedModule:
    """What the classes made by rules have in common."""

    #: The class that the module had, and has again after `unfuse`.
    _relu_mlp_original: type[nn.Module]

    # What a rewritten method calls. The functions are in the order in which a nested call
    # evaluates them: the last first.

    _relu_mlp_with = _With
    _relu_mlp_relu = staticmethod(_call_relu)
    _relu_mlp_relu_ = staticmethod(_call_relu_)
    _relu_mlp_cast = staticmethod(_cast)

    @staticmethod
    def _relu_mlp_try(functions: tuple[Any, ...], input: Any) -> Tensor | None:
        """What calling the functions makes of the input, if the operators can do it."""
        run = _run_of(functions, input)
        if run is None:
            return None
        return call_operators(input, run.weights, run.biases, run.activation, False)

    @staticmethod
    def _relu_mlp_natively(functions: tuple[Any, ...], input: Any) -> Any:
        """What calling the functions makes of the input."""
        for function in reversed(functions):
            input = function(input)
        return input

    @staticmethod
    def _relu_mlp_call(functions: tuple[Any, ...], input: Any) -> Any:
        """The same, by the operators if they can do it."""
        output = FusedModule._relu_mlp_try(functions, input)
        return FusedModule._relu_mlp_natively(functions, input) if output is None else output

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Only the original class can be found by its name.
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        function, arguments, *state = reduced
        if arguments[:1] == (type(self),):
            function, arguments = _new, (type(self)._relu_mlp_original, *arguments[1:])
        return (function, arguments, *state)


def _new(original: type[nn.Module], *arguments: Any) -> nn.Module:
    """A fused module without its state; one of the original class if it can't be fused here."""
    module_class, rule = original, rule_for(original)
    if rule is not None:
        with contextlib.suppress(NotRecognised):
            module_class = fused_class(original, rule)
    return module_class.__new__(module_class, *arguments)


class Fusion(NamedTuple):
    """How the modules of a class are fused."""

    module_class: type[nn.Module]  #: that they get
    recognised: Recognised


def fused_class(original: type[nn.Module], rule: Rule) -> type[nn.Module]:
    """The subclass of a class of modules that follows a rule: one for all of them.

    Raises:
        NotRecognised: if there can't be one.
    """
    return _fusion_of(original, rule).module_class


def _fusion_of(original: type[nn.Module], rule: Rule) -> Fusion:
    key = (original, rule, getattr(original, rule.method, None))
    if key not in _fusions:
        try:
            made: Fusion | str = _make_fusion(*key)
        except NotRecognised as reason:
            made = str(reason)
        _fusions.setdefault(key, made)  # of two threads, one gets the other's
    fusion = _fusions[key]
    if isinstance(fusion, str):
        raise NotRecognised(fusion)
    return fusion


#: What was made for a class, its rule and its method, or why nothing was.
_fusions: dict[tuple[type[nn.Module], Rule, Any], Fusion | str] = {}


def _make_fusion(original: type[nn.Module], rule: Rule, known: Any) -> Fusion:
    recognised = recognise(original, known, rule.linears)

    @functools.wraps(known)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Looked up now, because somebody may have replaced it.
        current = getattr(original, rule.method)
        return (recognised.function if current is known else current)(self, *args, **kwargs)

    namespace = {
        rule.method: method,
        "_relu_mlp_original": original,
        "__doc__": f"A {original.__name__} whose {', '.join(rule.linears)} are one operator.",
        # torch.fx knows by it what is a layer of PyTorch's, and looks into no layer.
        "__module__": original.__module__,
    }
    name = f"Fused{original.__name__}"
    try:
        made = types.new_class(name, (FusedModule, original), {}, lambda ns: ns.update(namespace))
    except Exception as error:
        raise NotRecognised(f"its class can't have a subclass: {error}") from error
    if recognised.knows_itself and made.__dict__[rule.method] is method:
        # It may ask whether it is its object's method. The class has not decorated ours anew.
        raise NotRecognised(f"its {rule.method} has a decorator that may do anything")
    return Fusion(made, recognised)


# -- The rules of this package ---------------------------------------------------------------

for _name in ("TransformerEncoderLayer", "TransformerDecoderLayer"):
    register_fusion(
        f"torch.nn.modules.transformer.{_name}",
        ["linear1", "linear2"],
        activation="activation",
        dropout="dropout",
        method="_ff_block",  # so the fast path in forward stays
    )

for _name, _path in {
    "T5": "t5.modeling_t5",
    "MT5": "mt5.modeling_mt5",
    "UMT5": "umt5.modeling_umt5",
    "LongT5": "longt5.modeling_longt5",
}.items():
    register_fusion(
        f"transformers.models.{_path}.{_name}DenseActDense",
        ["wi", "wo"],
        activation="act",
        dropout="dropout",
    )

register_fusion(
    "transformers.models.opt.modeling_opt.OPTDecoderLayer",
    ["fc1", "fc2"],
    activation="activation_fn",
)
