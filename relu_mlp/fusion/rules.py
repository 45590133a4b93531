"""`register_fusion`: which Linears of a class of modules form one network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from .conditions import path_of


class Rule(NamedTuple):
    """The arguments of `register_fusion`."""

    linears: tuple[str, ...]
    activation: str | None
    dropout: str | None
    method: str


#: By class, or by its full name, so that no package has to be imported for its rule.
_rules: dict[type[nn.Module] | str, Rule] = {}


def register_fusion(
    module_class: type[nn.Module] | str,
    linears: Iterable[str],
    *,
    activation: str | None = None,
    dropout: str | None = None,
    method: str = "forward",
) -> None:
    """Tells `fuse` which Linears of a class of modules form one ReLU network.

    The rule is for a method that computes, among other things::

        h = self.fc1(x)
        h = F.relu(h)           # or self.activation(h)
        h = self.dropout(h)     # or no dropout, or F.dropout(...)
        y = self.fc2(h)

    or the same in fewer statements, ``y = x + self.fc2(F.relu(self.fc1(x)))``. There may
    be more than two Linears. `fuse` reads the source of the method. It serves a network
    that it recognizes completely: calls of these Linears in this order, with only ReLU
    and dropout between them, and hidden values that nothing else can see. The rest of
    the method may be anything. A method without such calls, or without source, is left
    as it is, and the report says why. Every call checks that the Linears and the
    functions between them are still what they were. If not, they are called one by one.

    Registering a class again replaces its rule for later calls of `fuse`.

    Args:
        module_class: the class, or its full name as text, such as
            ``"package.module.Class"``; a name causes no import. Subclasses may have other
            methods and need a rule of their own.
        linears: the names of two or more children, in the order of the calls.
        activation: an attribute that must hold the ReLU, an `nn.ReLU` or the function,
            for a module to be fused; None if the method calls `F.relu`, `torch.relu` or
            `h.relu()`.
        dropout: a child that must be an `nn.Dropout`; None if there is none, or if the
            method calls `F.dropout`.
        method: the method that calls the Linears.

    Raises:
        TypeError: if `module_class` is neither a subclass of `nn.Module` nor text, or if
            a name is not text.
        ValueError: if `linears` has fewer than two names or a name twice, or if the class
            has no such method.

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
    # A string is iterable too, and each of its letters would count as a name.
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
    """The rule for exactly this class."""
    return _rules.get(module_class) or _rules.get(path_of(module_class))
