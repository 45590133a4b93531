"""Autocast: the network is cast as `torch.nn.functional.linear` casts its arguments.

Under autocast for the device of the tensors, `F.linear` casts input, weight and
bias to autocast's dtype, and ReLU, sigmoid and tanh run in the dtype of their input.
So the network is cast once, before it runs, by operations that autograd records: the
gradients of float32 parameters are float32. After that autocast has nothing left to
cast, so it may stay on.

PyTorch caches the casts of weights within a region, but only its own layers can use
that cache. Here every call casts again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from ._torch_private import disable_autocast, register
from .ops import NO_TENSOR


def cast(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A network in the dtype of autocast; the same tensors where autocast is off.

    Args:
        x: (*, in_features); its device decides whether autocast is on.
        weights: (out_features, in_features) each.
        biases: nothing, or (out_features,) each, `NO_TENSOR` where one is missing.

    Returns:
        x, weights and biases. Floating-point tensors other than float64 are in
        autocast's dtype, and the others unchanged.
    """
    device = x.device.type
    # For a device without autocast the second question is an error.
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x, list(weights), list(biases)
    dtype = torch.get_autocast_dtype(device)

    def casted(tensor: Tensor) -> Tensor:
        is_cast = tensor.is_floating_point() and tensor.dtype is not torch.float64
        return tensor.to(dtype) if is_cast and tensor is not NO_TENSOR else tensor

    return casted(x), [casted(w) for w in weights], [casted(b) for b in biases]


# -- The rule of the public operator ------------------------------------------


def _relu_mlp_autocast(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_activation: str = "none",
) -> Tensor:
    network = cast(x, weights, biases)
    with disable_autocast():
        return torch.ops.relu_mlp.relu_mlp.default(*network, output_activation)


_library = ops.kernels_of(__name__)

for _key in ("AutocastCPU", "AutocastCUDA"):
    register(_library, "relu_mlp", _relu_mlp_autocast, _key)
