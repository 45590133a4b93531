"""Checks of the arguments, in the words of csrc/ops.cpp.

The extension checks its own arguments; these serve the reference and the fake
kernels. A message names the argument, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def name_of(dtype: torch.dtype) -> str:
    """``torch.float32`` as "float32"."""
    return str(dtype).removeprefix("torch.")


def check_name(argument: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        *most, last = (repr(option) for option in known)
        raise RuntimeError(f"{argument} must be {', '.join(most)} or {last}, got {name!r}")


def check_like_x(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raises RuntimeError unless `tensor` has the dtype and the device of `x`."""
    if tensor.dtype != x.dtype:
        raise RuntimeError(f"{name} must be {name_of(x.dtype)} like x, got {name_of(tensor.dtype)}")
    if tensor.device != x.device:
        raise RuntimeError(f"{name} must be on {x.device} like x, got {tensor.device}")


def check_layers(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    """Raises RuntimeError unless the weights and biases chain, starting from x."""
    if x.dim() < 1:
        raise RuntimeError("x must have at least one dimension, got shape ()")
    if x.dtype not in DTYPES:
        raise RuntimeError(
            f"x must be float64, float32, bfloat16 or float16, got {name_of(x.dtype)}"
        )
    if not weights:
        raise RuntimeError("weights must have at least one entry, got none")
    if biases and len(biases) != len(weights):
        raise RuntimeError(
            f"biases must have one entry for each of the {len(weights)} weights, got {len(biases)}"
        )
    check_chain(x, weights, biases)


def check_chain(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    """The part of `check_layers` that holds for tensors of any dtype."""
    features = x.shape[-1]
    for layer, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[1] != features:
            before = f"weights[{layer - 1}]" if layer else "x"
            raise RuntimeError(
                f"weights[{layer}] must have shape (out_features, {features}) "
                f"to follow {before}, got {tuple(weight.shape)}"
            )
        check_like_x(f"weights[{layer}]", weight, x)
        features = weight.shape[0]
        if biases and biases[layer].numel() > 0:
            bias = biases[layer]
            if bias.dim() != 1 or bias.shape[0] != features:
                raise RuntimeError(
                    f"biases[{layer}] must have shape ({features},), got {tuple(bias.shape)}"
                )
            check_like_x(f"biases[{layer}]", bias, x)


def check_like_output(name: str, tensor: Tensor, x: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise RuntimeError(
            f"{name} must have the output's shape {tuple(shape)}, got {tuple(tensor.shape)}"
        )
    check_like_x(name, tensor, x)
