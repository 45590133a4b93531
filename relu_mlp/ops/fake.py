"""The fake kernels: the shapes, strides and dtypes that an operator returns, without values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks, reference
from ..activations import ACTIVATIONS
from .library import kernels_of

_library = kernels_of(__name__)


@torch.library.register_fake("relu_mlp::forward", lib=_library)
def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_activation: str,
    save_hidden: bool,
) -> tuple[Tensor, list[Tensor]]:
    checks.check_layers(x, weights, biases)
    checks.check_name("output_activation", output_activation, ACTIVATIONS)
    y = x.new_empty(*x.shape[:-1], weights[-1].shape[0])
    rows = reference.as_matrix(x).shape[0]
    hidden = [x.new_empty(rows, weight.shape[0]) for weight in weights[:-1] if save_hidden]
    return y, hidden


@torch.library.register_fake("relu_mlp::relu_mlp", lib=_library)
def relu_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_activation: str = "none",
) -> Tensor:
    checks.check_layers(x, weights, biases)
    checks.check_name("output_activation", output_activation, ACTIVATIONS)
    return x.new_empty(*x.shape[:-1], weights[-1].shape[0])


@torch.library.register_fake("relu_mlp::backward", lib=_library)
def backward(
    grad_output: Tensor, saved: Sequence[Tensor], output_activation: str, needs: str
) -> list[Tensor]:
    return [
        grad.new_empty(grad.shape)
        for grad in reference.backward(grad_output, saved, output_activation, needs)
    ]


@torch.library.register_fake("relu_mlp::backward_vjp", lib=_library)
def backward_vjp(
    grad_output: Tensor,
    saved: Sequence[Tensor],
    output_activation: str,
    needs: str,
    cotangents: Sequence[Tensor],
    given: str,
    wanted: str,
) -> list[Tensor]:
    return [
        grad.new_empty(grad.shape)
        for grad in reference.backward_vjp(
            grad_output, saved, output_activation, needs, cotangents, given, wanted
        )
    ]


@torch.library.register_fake("relu_mlp::recompute_backward", lib=_library)
def recompute_backward(
    grad_output: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_activation: str,
    needs: str,
) -> list[Tensor]:
    return [
        grad.new_empty(grad.shape)
        for grad in reference.recompute_backward(
            grad_output, x, weights, biases, output_activation, needs
        )
    ]


@torch.library.register_fake("relu_mlp::loss_and_grads", lib=_library)
def loss_and_grads(
    x: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    loss: str,
    output_activation: str,
) -> tuple[Tensor, list[Tensor]]:
    checks.check_layers(x, weights, biases)
    checks.check_name("output_activation", output_activation, ACTIVATIONS)
    checks.check_name("loss", loss, reference.LOSSES)
    checks.check_target(target, x, weights, reference.has_classes(loss, target), loss)
    return x.new_empty(()), [p.new_empty(p.shape) for p in [*weights, *biases]]
