"""Autocast: what `torch.nn.functional.linear` makes of its arguments there.

Under autocast for the device of the tensors, `F.linear` casts input, weight and
bias to autocast's dtype, and ReLU, sigmoid and tanh run in the dtype that comes.
So the network is cast once, at its entrance, by operations that autograd records:
the gradients of float32 parameters are float32. A cast network has nothing left to
cast, and so autocast may stay on around it.

PyTorch remembers the casts of a region's weights, and gives no way to that memory
but through its own layers. Here every call casts anew.
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
    """A network as autocast has it; the same tensors where it asks for nothing.

    Args:
        x: (*, in_features); its device decides whether autocast is on.
        weights: (out_features, in_features) each.
        biases: nothing, or (out_features,) each, `NO_TENSOR` where one is missing.

    Returns:
        x, weights and biases: those of them that are floating-point and not float64
        in autocast's dtype, and the others as they are.
    """
    device = x.device.type
    # There are devices without autocast, to ask about which is an error.
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x, list(weights), list(biases)
    dtype = torch.get_autocast_dtype(device)

    def casted(tensor: Tensor) -> Tensor:
        is_cast = tensor.is_floating_point() and tensor.dtype is not torch.float64
        return tensor.to(dtype) if is_cast and tensor is not NO_TENSOR else tensor

    return casted(x), [casted(w) for w in weights], [casted(b) for b in biases]


# -- The rule of the operator for people --------------------------------------


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
