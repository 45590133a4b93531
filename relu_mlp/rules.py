"""Rules for `fuse`: which Linears of a module of a given class are one network.

A module whose class has a rule gets a subclass of that class, which differs in one
method. There the original method runs, but it sees `self` through a `_View`, in which
a `_Layer` stands for each Linear of the rule. The first hands on a `_Hidden` instead of
a tensor: x, and how far the network has got. It passes through ReLU and through a
dropout that does nothing, and the last Linear makes one call of the operators of it.
Whatever else the method does with a `_Hidden`, the layers are computed natively then.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import functional
from .checks import DTYPES
from .functional import fused, is_plain, is_served
from .modules import Run, _are_all_patched, _is_patched, find_run

#: What is ReLU when it is called as a function.
RELUS = (F.relu, torch.relu)

#: Stands for an activation that is a function, and carries no hooks.
_RELU = nn.ReLU()

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

    and does not change `x` in place on the way. There may be more than two Linears. A
    method that does something else with `h` gets what it would get without the rule,
    by the native layers.

    Registering a class again replaces its rule for what is fused from then on.

    Args:
        module_class: the class, or its path as text, such as
            ``"package.module.Class"``; then nothing is imported. Subclasses have other
            methods, perhaps, and need a rule of their own.
        linears: the names of two or more children, in the order of the calls.
        activation: the attribute that holds the ReLU, an `nn.ReLU` or the function;
            None if the method calls `F.relu`, `torch.relu` or `h.relu()`.
        dropout: the child that is the `nn.Dropout`; None if there is none, or the
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
    path = f"{module_class.__module__}.{module_class.__qualname__}"
    return _rules.get(module_class) or _rules.get(path)


# -- What is untouched, and what is not ----------------------------------------------------


def does_nothing(child: nn.Module) -> bool:
    """Whether calling it returns its input: Identity, and Dropout in eval mode or of p = 0."""
    if type(child) is nn.Dropout:
        return (
            (not child.training or child.p == 0)
            and 0 <= child.p <= 1  # else it raises
            and nn.Dropout.forward is _dropout_forward
            and not _is_patched(child.__dict__)
        )
    return (
        type(child) is nn.Identity
        and nn.Identity.forward is _identity_forward
        and not _is_patched(child.__dict__)
    )


def may_do_nothing(child: nn.Module) -> bool:
    """Whether it is one of those that `does_nothing` may be true of, perhaps in another mode."""
    return type(child) in (nn.Dropout, nn.Identity) and not _is_patched(child.__dict__)


def problem_of(child: Any) -> str | None:
    """What keeps a Linear, an activation or a dropout from being fused, or None."""
    if isinstance(child, nn.Module) and _is_patched(child.__dict__):
        return "has a forward of its own" if "forward" in child.__dict__ else "carries a hook"
    if not isinstance(child, nn.Linear):
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


def _relu_of(module: nn.Module, rule: Rule) -> nn.ReLU | None:
    """The ReLU between the Linears, or what stands for it; None if it is no ReLU."""
    if rule.activation is None:
        return _RELU
    activation = getattr(module, rule.activation, None)
    if type(activation) is nn.ReLU:
        return activation
    return _RELU if any(activation is relu for relu in RELUS) else None


def reason_to_leave(module: nn.Module, rule: Rule) -> str | None:
    """Why a module is not what its rule expects, or None."""
    if rule.method in module.__dict__:
        return f"has a {rule.method} of its own"
    if not callable(getattr(type(module), rule.method, None)):
        return f"has no {rule.method}, which its rule names"
    for name in rule.linears:
        linear = getattr(module, name, None)
        if not isinstance(linear, nn.Linear):
            return f"its {name} is no Linear but {_described(linear)}"
        if problem := problem_of(linear):
            return f"its {name} {problem}"
    for name in filter(None, (rule.activation, rule.dropout)):
        if problem := problem_of(getattr(module, name, None)):
            return f"its {name} {problem}"
    if _relu_of(module, rule) is None:
        return (
            f"its {rule.activation} is {_described(getattr(module, rule.activation or '', None))}"
        )
    if rule.dropout is not None:
        dropout = getattr(module, rule.dropout, None)
        if not isinstance(dropout, nn.Module) or not may_do_nothing(dropout):
            return f"its {rule.dropout} is no Dropout but {_described(dropout)}"
    return None


def _described(value: Any) -> str:
    if isinstance(value, nn.Module):
        return type(value).__name__
    return getattr(value, "__name__", repr(value))


def _run_of(module: nn.Module, rule: Rule, x: Any) -> Run | None:
    """The network of a module if the operators may serve it for x, now and as it is."""
    if not is_served(x) or _are_all_patched():
        return None
    relu = _relu_of(module, rule)
    if relu is None:
        return None
    if rule.dropout is not None and not does_nothing(getattr(module, rule.dropout)):
        return None
    linears = [getattr(module, name) for name in rule.linears]
    chain = [child for linear in linears for child in (linear, relu)][:-1]
    run = find_run(chain)
    if run is None or len(run.children) < len(chain):
        return None
    functional.check_empty_biases(run.weights, run.biases)
    return run


# -- The network on its way -------------------------------------------------------------


def _state_of(x: Tensor) -> tuple[int, bool, torch.dtype | None]:
    """The version of x, whether gradients are enabled, and the dtype of autocast if it is on."""
    autocast, device = None, x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        autocast = torch.get_autocast_dtype(device)
    return _version_of(x), torch.is_grad_enabled(), autocast


def _autocast_as(dtype: torch.dtype | None, device: str) -> AbstractContextManager[Any]:
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, dtype, enabled=dtype is not None)


class _Hidden:
    """What the Linears of a rule hand on in place of a tensor: it has not been computed yet.

    Args:
        x: (*, in_features), the input of the network.
        run: the network.
        depth: the number of Linears that were called.
        is_activated: whether ReLU was called after the last of them.
        state: what must not change until the network is computed.
    """

    def __init__(self, x: Tensor, run: Run, depth: int, is_activated: bool, state: Any) -> None:
        self.x = x
        self.run = run
        self.depth = depth
        self.is_activated = is_activated
        self.state = state
        self.value: Tensor | None = None  #: once it was computed, natively

    @classmethod
    def first(cls, x: Tensor, run: Run) -> _Hidden:
        return cls(x, run, 1, False, _state_of(x))

    @property
    def dtype(self) -> torch.dtype:
        _, _, autocast = self.state
        return self.x.dtype if self.x.dtype is torch.float64 else autocast or self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    def compute(self) -> Tensor:
        """The tensor, by the native layers, as it would have been computed at first."""
        if self.value is None:
            version, with_grad, autocast = self.state
            if _version_of(self.x) != version:
                raise RuntimeError(
                    "the input of a fused network was changed in place before its last Linear "
                    "was called: a module that does this can't be fused, see register_fusion"
                )
            value = self.x
            linears = self.run.children[: 2 * self.depth : 2]
            with torch.set_grad_enabled(with_grad), _autocast_as(autocast, value.device.type):
                for layer, linear in enumerate(linears):
                    value = F.relu(linear(value)) if layer else linear(value)
                self.value = F.relu(value) if self.is_activated else value
        return self.value

    def through(self, linear: nn.Module) -> Any:
        """What a Linear makes of it: the output of the network after the last one."""
        run, at = self.run, 2 * self.depth
        if (
            self.value is None
            and self.is_activated
            and at < len(run.children)
            and run.children[at] is linear
            and self.state == _state_of(self.x)
            and is_served(self.x)
        ):
            if at < len(run.children) - 1:
                return _Hidden(self.x, run, self.depth + 1, False, self.state)
            return fused(self.x, run.weights, run.biases, run.activation, False)
        return linear(self.compute())

    def relu(self, inplace: bool = False) -> Any:
        if self.value is not None:
            return F.relu(self.value, inplace)
        if inplace:
            self.is_activated = True
            return self
        return _Hidden(self.x, self.run, self.depth, True, self.state)

    def dropout(self, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        if self.value is None and (not training or p == 0) and 0 <= p <= 1:
            return self
        return F.dropout(self.compute(), p, training, inplace)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.compute(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and type(args[0]) is _Hidden:
            if func in RELUS:
                return args[0].relu(*args[1:], **kwargs)
            if func is F.dropout:
                return args[0].dropout(*args[1:], **kwargs)
        args, kwargs = tree_map(_computed, (args, kwargs))
        return func(*args, **kwargs)


def _computed(value: Any) -> Any:
    return value.compute() if type(value) is _Hidden else value


def _operator(name: str) -> Callable[..., Any]:
    def operator(self: _Hidden, *others: Any) -> Any:
        return getattr(self.compute(), name)(*map(_computed, others))

    return operator


# Python looks these up in the class and not by `__getattr__`.
for _name in ("add", "sub", "mul", "truediv", "pow", "matmul"):
    for _kind in ("", "r", "i"):
        setattr(_Hidden, f"__{_kind}{_name}__", _operator(f"__{_kind}{_name}__"))
for _name in ("neg", "abs", "lt", "le", "gt", "ge", "eq", "ne", "getitem", "setitem", "len"):
    setattr(_Hidden, f"__{_name}__", _operator(f"__{_name}__"))


def _version_of(x: Tensor) -> int:
    """Counts changes in place, where they are counted."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


class _Layer:
    """A Linear of a rule, as the method sees it."""

    def __init__(self, module: nn.Module, rule: Rule, position: int) -> None:
        self.module = module
        self.rule = rule
        self.position = position
        self.linear = getattr(module, rule.linears[position])

    def __call__(self, input: Any) -> Any:
        if type(input) is _Hidden:
            return input.through(self.linear)
        if self.position == 0:
            run = _run_of(self.module, self.rule, input)
            if run is not None:
                return _Hidden.first(input, run)
        return self.linear(input)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.linear, name)


class _View:
    """A module as its own method sees it: only the Linears are others."""

    _viewed: nn.Module

    def __init__(self, module: nn.Module) -> None:
        object.__setattr__(self, "_viewed", module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._viewed, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._viewed, name, value)


# -- The classes -------------------------------------------------------------------------


class FusedModule:
    """What the classes made by rules have in common."""

    #: The class that the module had, and has again after `unfuse`.
    _original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Only the original class can be found by its name.
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        function, arguments, *state = reduced
        if arguments[:1] == (type(self),):
            function, arguments = _new, (self._original, *arguments[1:])
        return (function, arguments, *state)


def _new(original: type[nn.Module], *arguments: Any) -> nn.Module:
    """A fused module without its state; one of the original class if that has no rule here."""
    rule = rule_for(original)
    module_class = original if rule is None else fused_class(original, rule)
    return module_class.__new__(module_class, *arguments)


def fused_class(original: type[nn.Module], rule: Rule) -> type[nn.Module]:
    """The subclass of a class of modules that follows a rule: one for all of them."""
    known = _classes.get((original, rule))
    # Of two threads, one gets the other's.
    return known or _classes.setdefault((original, rule), _make_fused_class(original, rule))


_classes: dict[tuple[type[nn.Module], Rule], type[nn.Module]] = {}


def _make_fused_class(original: type[nn.Module], rule: Rule) -> type[nn.Module]:

    def layer(position: int) -> property:
        return property(lambda view: _Layer(view._viewed, rule, position))

    @functools.wraps(getattr(original, rule.method))
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Looked up now, because somebody may have replaced it.
        return _computed(getattr(original, rule.method)(view_class(self), *args, **kwargs))

    layers = {name: layer(position) for position, name in enumerate(rule.linears)}
    # A decorated method may compare itself with the one of its object's class.
    view_class = type(f"_{original.__name__}View", (_View,), {**layers, rule.method: method})
    name = f"Fused{original.__name__}"
    namespace = {
        rule.method: method,
        "_original": original,
        "__doc__": f"A {original.__name__} whose {', '.join(rule.linears)} are one operator.",
        "__module__": __name__,
    }
    return types.new_class(name, (FusedModule, original), {}, lambda ns: ns.update(namespace))


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
