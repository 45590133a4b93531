"""The reference as kernels of the operators, where the library has no kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import reference
from .._torch_private import has_kernel, register
from .library import LIBRARY_PATH, OPERATORS, kernels_of

_library = kernels_of(__name__)

_OPERATORS: dict[str, Callable[..., Any]] = {name: getattr(reference, name) for name in OPERATORS}

# Every device without kernels of its own.
for _name, _kernel in _OPERATORS.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")

# torch.autograd.grad(is_grads_batched=True) has a vmap of its own, older than torch.func's.
# It takes no batching rules in Python, but it has rules for PyTorch's operations.
for _name in ("relu_mlp", "forward", "backward", "backward_vjp", "recompute_backward"):
    register(_library, _name, _OPERATORS[_name], "Batched")

# Without the library, there is nothing to describe.
if LIBRARY_PATH is None and not has_kernel("relu_mlp::_build_info", "CompositeExplicitAutograd"):
    _library.impl("_build_info", lambda: "", "CompositeExplicitAutograd")
