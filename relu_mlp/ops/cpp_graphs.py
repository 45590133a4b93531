"""Graphs that Inductor writes in C++: AOTInductor, cpp_wrapper.

Such a graph can't call a kernel in Python (csrc/operators.h says why). So while one is recorded,
each operator is replaced by a second one, ``_..._in_cpp``, which has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from .. import reference
from .._torch_private import inductor_writes_cpp
from . import fake
from .library import kernels_of

_library = kernels_of(__name__)


def _as_list(function: Callable[..., tuple[Tensor, list[Tensor]]]) -> Callable[..., list[Tensor]]:
    """Turns a function that returns (tensor, tensors) into one that returns a single list."""

    def as_list(*arguments: Any) -> list[Tensor]:
        first, others = function(*arguments)
        return [first, *others]

    return as_list


def _record(mode: ProxyTorchDispatchMode, operator: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Records a call of an operator in a graph.

    Recording runs below autograd, so the operator that takes its place needs no derivative.
    """
    if not inductor_writes_cpp():
        return mode.__torch_dispatch__(operator, types, args, kwargs)
    name = operator.name().removeprefix("relu_mlp::")
    in_cpp = getattr(torch.ops.relu_mlp, f"_{name}_in_cpp").default
    results: Any = mode.__torch_dispatch__(in_cpp, types, args, kwargs)
    return (results[0], results[1:]) if name in ("forward", "loss_and_grads") else results


for _name, _kernel, _fake in (
    ("relu_mlp", reference.relu_mlp, fake.relu_mlp),
    ("forward", _as_list(reference.forward), _as_list(fake.forward)),
    ("backward", reference.backward, fake.backward),
    ("backward_vjp", reference.backward_vjp, fake.backward_vjp),
    ("recompute_backward", reference.recompute_backward, fake.recompute_backward),
    ("loss_and_grads", _as_list(reference.loss_and_grads), _as_list(fake.loss_and_grads)),
):
    _library.impl(f"_{_name}_in_cpp", _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"relu_mlp::_{_name}_in_cpp", _fake, lib=_library)
    torch.library.register_torch_dispatch(
        f"relu_mlp::{_name}", ProxyTorchDispatchMode, _record, lib=_library
    )
