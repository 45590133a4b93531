"""Which layers can be fused, which layers do nothing, and why a layer can't be fused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..checks import DTYPES
from ..functional import is_plain
from ..run import is_patched

#: The functions that compute ReLU.
RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_)

#: `F.dropout` as it was at import: somebody may replace it later.
DROPOUT_FUNCTION = F.dropout

_dropout_forward = nn.Dropout.forward
_identity_forward = nn.Identity.forward


def path_of(module_class: type) -> str:
    """The full name of a class, such as "package.module.Class"."""
    return f"{module_class.__module__}.{module_class.__qualname__}"


def does_nothing(child: nn.Module) -> bool:
    """Whether a call returns its input: Identity, and Dropout in eval mode or with p = 0."""
    if type(child).__call__ is not nn.Module.__call__ or is_patched(child.__dict__):
        return False
    if type(child) is nn.Dropout:
        return (
            (not child.training or child.p == 0)
            and 0 <= child.p <= 1  # otherwise the call raises
            and nn.Dropout.forward is _dropout_forward
            and F.dropout is DROPOUT_FUNCTION
        )
    return type(child) is nn.Identity and nn.Identity.forward is _identity_forward


def may_do_nothing(child: nn.Module) -> bool:
    """Whether `does_nothing` can be true of a module, perhaps in another mode."""
    return type(child) in (nn.Dropout, nn.Identity) and not is_patched(child.__dict__)


def is_linear_like(child: Any) -> bool:
    """Whether a child is a Linear of PyTorch or of another library."""
    return isinstance(child, nn.Linear) or (
        isinstance(child, nn.Module) and type(child).__name__.endswith("Linear")
    )


def is_relu(function: Any) -> bool:
    return type(function) is nn.ReLU or any(function is relu for relu in RELU_FUNCTIONS)


def problem_of(child: Any) -> str | None:
    """The reason why a Linear, an activation or a dropout can't be fused, or None."""
    if isinstance(child, nn.Module) and is_patched(child.__dict__):
        return "has a forward of its own" if "forward" in child.__dict__ else "carries a hook"
    if not isinstance(child, nn.Linear):
        if is_linear_like(child):
            return f"is not an nn.Linear but a {path_of(type(child))}"
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
            return f"has a {name} that is a {type(tensor).__name__}, not a dense Parameter"
        if tensor.dtype not in DTYPES:
            return f"has a {name} of {tensor.dtype}"
    return None


def described(value: Any) -> str:
    """The description of a module or a function for a report."""
    if isinstance(value, nn.Module):
        return type(value).__name__
    return getattr(value, "__name__", "None" if value is None else f"a {type(value).__name__}")
