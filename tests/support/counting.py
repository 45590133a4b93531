"""Counts calls of the operators and of PyTorch's own layers, and collects saved tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from relu_mlp import reference

#: PyTorch's matrix products, as its dispatcher calls them.
PRODUCTS = {"aten::addmm", "aten::mm", "aten::linear", "aten::bmm", "aten::matmul"}


@contextmanager
def count_calls() -> Iterator[dict[str, int]]:
    """Counts the calls of the operators, or of the reference in their place.

    The keys are "forward", "backward" and "loss_and_grads", and "native" for
    the linear layers and matrix products that ran outside of them. A pass is
    counted under its direction, whichever of the operators makes it. The key
    "backward_vjp" is there if that operator was called.
    """
    counts = dict.fromkeys(["forward", "backward", "loss_and_grads", "native"], 0)
    passes = {
        "relu_mlp": "forward",
        "forward": "forward",
        "backward": "backward",
        "backward_vjp": "backward_vjp",
        "recompute_backward": "backward",
        "loss_and_grads": "loss_and_grads",
    }
    inside = [0]

    def count(key: str) -> None:
        counts[key] = counts.get(key, 0) + 1

    class Mode(TorchDispatchMode):
        understands_relu_mlp = True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name
            if name.startswith("relu_mlp::"):
                count(passes[name.removeprefix("relu_mlp::")])
            elif name in PRODUCTS and not inside[0]:
                counts["native"] += 1
            return func(*args, **(kwargs or {}))

    originals = {name: getattr(reference, name) for name in passes if name != "relu_mlp"}
    passes |= {f"_{name}_in_cpp": direction for name, direction in passes.items()}

    def counted(name):
        def function(*args, **kwargs):
            if not inside[0]:
                count(passes[name])
            inside[0] += 1
            try:
                return originals[name](*args, **kwargs)
            finally:
                inside[0] -= 1

        return function

    for name in originals:
        setattr(reference, name, counted(name))
    try:
        with Mode():
            yield counts
    finally:
        for name, function in originals.items():
            setattr(reference, name, function)


@contextmanager
def backward_passes() -> Iterator[list[tuple[str, int]]]:
    """Collects the backward passes: the needs, and the number of gradients that were computed.

    A mode sees the operators, whoever calls them. Without them the reference is called.
    """
    names = ("backward", "recompute_backward")
    passes: list[tuple[str, int]] = []

    class Mode(TorchDispatchMode):
        understands_relu_mlp = True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func._schema.name in [f"relu_mlp::{name}" for name in names]:
                passes.append((args[-1], len(result)))
            return result

    def recorded(function):
        def call(*args):
            result = function(*args)
            passes.append((args[-1], len(result)))
            return result

        return call

    with pytest.MonkeyPatch.context() as patch, Mode():
        for name in names:
            patch.setattr(reference, name, recorded(getattr(reference, name)))
        yield passes


@contextmanager
def dispatched() -> Iterator[list[tuple[str, int]]]:
    """Collects PyTorch's operations: the name, and the number of elements that the largest
    tensor among the results holds in memory."""
    operations: list[tuple[str, int]] = []

    class Mode(TorchDispatchMode):
        understands_relu_mlp = True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            held = [
                tensor.untyped_storage().nbytes() // tensor.element_size()
                for tensor in tree_leaves(result)
                if isinstance(tensor, Tensor)
            ]
            operations.append((func._schema.name, max(held, default=0)))
            return result

    with Mode():
        yield operations


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """Collects the tensors that are saved for a backward pass."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved
