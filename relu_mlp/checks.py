"""Checks of the arguments, with the same messages as csrc/checks.h.

The library checks its arguments itself. These checks serve the reference and the fake
kernels. A message names the argument, what was expected and what was given.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from ._torch_private import get_tracing_state, has_no_storage_by_nature

DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def name_of(dtype: torch.dtype) -> str:
    """``torch.float32`` as "float32"."""
    return str(dtype).removeprefix("torch.")


def listed(names: Iterable[str]) -> str:
    """Names for a message: "'sigmoid', 'tanh' or 'relu'"."""
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}"


def check_name(argument: str, name: str, known: Collection[str]) -> None:
    """Raises RuntimeError unless `name` is one of the known names."""
    if name not in known:
        raise RuntimeError(f"{argument} must be {listed(known)}, got {name!r}")


def check_like_x(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raises RuntimeError unless `tensor` has the dtype and the device of `x`."""
    if tensor.dtype != x.dtype:
        raise RuntimeError(f"{name} must be {name_of(x.dtype)} like x, got {name_of(tensor.dtype)}")
    check_device(name, tensor, x)


def check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise RuntimeError(f"{name} must be on {x.device} like x, got {tensor.device}")


def check_tensor(name: str, tensor: object) -> None:
    """Raises TypeError for None, which PyTorch passes on as an operator's first tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")


def check_layers(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    """Raises RuntimeError unless the weights and biases chain, starting from x."""
    check_tensor("x", x)
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
    check_storage("x", x)
    for layer, weight in enumerate(weights):
        check_storage(f"weights[{layer}]", weight)
    for layer, bias in enumerate(biases):
        check_storage(f"biases[{layer}]", bias)


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
        if not biases:
            continue
        bias = biases[layer]
        if bias.numel() > 0:
            if bias.dim() != 1 or bias.shape[0] != features:
                raise RuntimeError(
                    f"biases[{layer}] must have shape ({features},), got {tuple(bias.shape)}"
                )
            check_like_x(f"biases[{layer}]", bias, x)
        elif bias.device.type not in ("cpu", x.device.type):
            # It stands for a missing bias, but the dispatcher chooses kernels by its device too.
            check_device(f"biases[{layer}]", bias, x)


def check_saved(saved: Sequence[Tensor], grad_output: Tensor) -> None:
    """Raises RuntimeError unless every tensor is on the device of `grad_output`.

    PyTorch's products accept a meta tensor beside one that has values, and compute nothing.
    """
    check_storage("relu_mlp::backward: grad_output", grad_output)
    for n, tensor in enumerate(saved):
        if tensor.device != grad_output.device:
            raise RuntimeError(
                f"relu_mlp::backward: saved[{n}] must be on {grad_output.device} "
                f"like grad_output, got {tensor.device}"
            )
        check_storage(f"relu_mlp::backward: saved[{n}]", tensor)


def check_like_output(name: str, tensor: Tensor, x: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise RuntimeError(
            f"{name} must have the output's shape {tuple(shape)}, got {tuple(tensor.shape)}"
        )
    check_like_x(name, tensor, x)
    check_storage(name, tensor)


def check_target(
    target: Tensor, x: Tensor, weights: Sequence[Tensor], has_classes: bool, loss: str
) -> None:
    """Raises RuntimeError unless a loss can compare the network's output with `target`.

    `has_classes` says whether it has a class for each row, and not values. A class that is no
    column of y is an IndexError.
    """
    classes = weights[-1].shape[0]
    if loss == "cross_entropy" and x.dim() > 2:
        raise RuntimeError(
            "x must have the shape (rows, in_features) or (in_features,) for cross entropy, got "
            f"{tuple(x.shape)}: flatten its leading dimensions, and those of target"
        )
    if not has_classes:
        if loss == "cross_entropy" and target.dtype != x.dtype:
            raise RuntimeError(
                f"target must be int64 for classes, or {name_of(x.dtype)} like x for "
                f"probabilities, got {name_of(target.dtype)}"
            )
        check_like_output("target", target, x, torch.Size([*x.shape[:-1], classes]))
        return
    if target.shape != x.shape[:-1]:
        raise RuntimeError(
            f"target must have the shape {tuple(x.shape[:-1])} of x without its last dimension to "
            f"hold classes, got {tuple(target.shape)}"
        )
    check_device("target", target, x)
    check_storage("target", target)
    check_classes(target, classes)


#: How the message of an IndexError begins, here and in the library, whose errors are RuntimeErrors.
OUT_OF_BOUNDS = "target is out of bounds"


def check_classes(target: Tensor, classes: int) -> None:
    """Raises IndexError for a class that is not a column of y, where its value can be read.

    On a GPU that would wait for it. There PyTorch's own kernels find a class out of bounds.
    """
    if (
        type(target) not in (Tensor, Parameter)
        or target.device.type != "cpu"
        or torch.compiler.is_compiling()
        or get_tracing_state()
    ):
        return
    is_bad = ((target < 0) | (target >= classes)) & (target != -100)
    if is_bad.any():
        row = int(is_bad.flatten().nonzero()[0])
        raise IndexError(
            f"{OUT_OF_BOUNDS}: a class must be at least 0 and less than {classes}, or -100 to be "
            f"ignored, got {int(target.flatten()[row])}"
            + (f" in row {row}" if target.dim() else "")
        )


def check_storage(name: str, tensor: Tensor) -> None:
    """Raises RuntimeError if the storage of an ordinary tensor lacks memory for its elements.

    `resize_` of a storage frees or shrinks it, and the tensor keeps its shape. Some of PyTorch's
    operations check this; others read memory that is not the tensor's.
    """
    if (
        type(tensor) not in (Tensor, Parameter)  # a subclass may have its memory elsewhere
        or torch.compiler.is_compiling()
        or get_tracing_state()
    ):
        return
    try:
        size = tensor.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):  # sparse, or wrapped by a transform
        return
    if size >= tensor.nbytes and tensor.is_contiguous() and not tensor.storage_offset():
        return
    steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + steps + 1) * tensor.itemsize
    if size < needed and tensor.numel() > 0 and not has_no_storage_by_nature(tensor):
        raise RuntimeError(
            f"{name} must have a storage with all its elements: shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()} and storage offset {tensor.storage_offset()} are out of "
            f"bounds for storage of {size} bytes, which resize_ may have freed"
        )


def check_needs(operator: str, needs: str, layers: int | None = None) -> None:
    """Raises RuntimeError unless `needs` has a character for x, every weight and every bias."""
    if len(needs) < 3 or len(needs) % 2 == 0 or not set(needs) <= {"0", "1"}:
        raise RuntimeError(
            f"relu_mlp::{operator}: needs must be 1 + 2 L characters '0' or '1', got {needs!r}"
        )
    if layers is not None and len(needs) != 1 + 2 * layers:
        raise RuntimeError(
            f"relu_mlp::{operator}: needs must have {1 + 2 * layers} characters, got {needs!r}"
        )


def check_grad_output(operator: str, grad_output: Tensor) -> None:
    check_tensor(f"relu_mlp::{operator}: grad_output", grad_output)
    if grad_output.dtype not in DTYPES:
        raise RuntimeError(
            f"relu_mlp::{operator}: grad_output must be float64, float32, bfloat16 or float16, "
            f"got {name_of(grad_output.dtype)}"
        )
    if grad_output.dim() < 1:
        raise RuntimeError(
            f"relu_mlp::{operator}: grad_output must have at least one dimension, got shape ()"
        )


def check_flags(argument: str, flags: str, count: int) -> None:
    """Raises RuntimeError unless `flags` has a character for each of `count` tensors."""
    if len(flags) != count or not set(flags) <= {"0", "1"}:
        raise RuntimeError(
            f"relu_mlp::backward_vjp: {argument} must be {count} characters '0' or '1', "
            f"got {flags!r}"
        )


def check_cotangents(
    cotangents: Iterable[Tensor], shapes: Iterable[tuple[int, ...]], grad_output: Tensor
) -> None:
    """Raises RuntimeError unless the cotangents have these shapes."""
    for n, (tensor, shape) in enumerate(zip(cotangents, shapes, strict=True)):
        if tuple(tensor.shape) != shape or tensor.dtype != grad_output.dtype:
            raise RuntimeError(
                f"relu_mlp::backward_vjp: cotangents[{n}] must be {name_of(grad_output.dtype)} "
                f"of shape {shape}, "
                f"got {name_of(tensor.dtype)} of shape {tuple(tensor.shape)}"
            )
        if tensor.device != grad_output.device:
            raise RuntimeError(
                f"relu_mlp::backward_vjp: cotangents[{n}] must be on {grad_output.device} "
                f"like grad_output, got {tensor.device}"
            )
        check_storage(f"relu_mlp::backward_vjp: cotangents[{n}]", tensor)


def check_operands(
    grad_output: Tensor,
    y: Tensor | None,
    weights: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
) -> None:
    """Raises RuntimeError unless the shapes of a backward pass's matrices chain."""

    def check(tensor: Tensor | None, rows: int, cols: int, name: str, layer: int) -> None:
        if tensor is None:
            return
        if tuple(tensor.shape) != (rows, cols) or tensor.dtype != grad_output.dtype:
            raise RuntimeError(
                f"relu_mlp::backward: {name} of layer {layer} must be "
                f"{name_of(grad_output.dtype)} of shape ({rows}, {cols}), "
                f"got {name_of(tensor.dtype)} of shape {tuple(tensor.shape)}"
            )

    rows, features = grad_output.shape
    check(y, rows, features, "the output", len(weights) - 1)
    for layer in reversed(range(len(weights))):
        weight, layer_input = weights[layer], inputs[layer]
        has_width = layer_input if weight is None else weight
        if has_width is None:
            continue
        if has_width.dim() != 2:
            raise RuntimeError(
                f"relu_mlp::backward: saved must have matrices, got shape {tuple(has_width.shape)}"
            )
        width = has_width.shape[1]
        check(weight, features, width, "the weight", layer)
        check(layer_input, rows, width, "the input", layer)
        features = width
