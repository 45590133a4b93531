"""`torch.vmap` of the operators: many networks, or many inputs, as batched products.

Every rule gets its operands with one more dimension, the batch dimension, or without it
where an operand is the same for all examples. With B examples of n rows each:

- If only x has the batch dimension, B inputs of n rows are one input of B n rows, and the
  operator is called once. A backward pass for the gradient of x alone does the same.
- The gradients of a parameter are wanted for each example, so they are not summed over
  the B: dW[b] = delta[b]^T a[b]. For one row each that is an outer product.
- If weights have the batch dimension (an ensemble), a layer is one batched product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, reference
from ._torch_private import (
    HAS_VMAP_TOOLS,
    add_batch_dim,
    below_vmap,
    current_interpreter,
    disable_autocast,
    unwrap_batched,
)
from .activations import ACTIVATION_BACKWARDS, ACTIVATIONS, select
from .ops import implementation_for

Dims = Sequence[int | None]


Rule = Callable[..., tuple[Any, Any]]


def register_rule(library: torch.library.Library, name: str, rule: Rule) -> None:
    """Registers the batching rule of an operator.

    `torch.library.register_vmap` could do this, but it flattens the lists of tensors as pytrees,
    six times per call. Per-sample gradients of a small network took twice as long with it. It is
    used where this PyTorch lacks the private names that a kernel needs.

    Args:
        rule: (batch_size, in_dims, *arguments) -> (results, out_dims). The dims hold a batch
            dimension, or a list of them, for each argument and each result. It is None for a
            tensor that all examples share, and for an argument that is not a tensor.
    """
    if HAS_VMAP_TOOLS:
        library.impl(name, kernel_of(name, rule), "FuncTorchBatched")
    else:
        torch.library.register_vmap(
            f"relu_mlp::{name}",
            lambda info, in_dims, *arguments: rule(info.batch_size, in_dims, *arguments),
            lib=library,
        )


def kernel_of(name: str, rule: Rule) -> Callable[..., Any]:
    """A kernel for vmap: the rule, or the operator itself if no argument is batched."""
    operator = getattr(torch.ops.relu_mlp, name).default

    def kernel(*arguments: Any) -> Any:
        interpreter: Any = current_interpreter()
        level, batch_size = interpreter.level(), interpreter.batch_size()
        pairs = [_unwrap(argument, level) for argument in arguments]
        in_dims = [dim for _, dim in pairs]
        # Runs below vmap with autocast off, as PyTorch does.
        with below_vmap(), disable_autocast():
            if not any(_is_batched(dim) for dim in in_dims):
                return operator(*arguments)
            results, out_dims = rule(batch_size, in_dims, *[operand for operand, _ in pairs])
        return _wrap(results, out_dims, level)

    return kernel


def _is_batched(dim: Any) -> bool:
    return any(each is not None for each in dim) if isinstance(dim, list) else dim is not None


def _unwrap(argument: Any, level: int) -> tuple[Any, Any]:
    """An argument without its batch dimension, and that dimension."""
    if isinstance(argument, Tensor):
        return unwrap_batched(argument, level)
    if isinstance(argument, (list, tuple)):
        pairs = [unwrap_batched(tensor, level) for tensor in argument]
        return [tensor for tensor, _ in pairs], [dim for _, dim in pairs]
    return argument, None


def _wrap(result: Any, dim: Any, level: int) -> Any:
    if isinstance(result, Tensor):
        return result if dim is None else add_batch_dim(result, dim, level)
    return type(result)(_wrap(*pair, level) for pair in zip(result, dim, strict=True))


def forward(
    batch_size: int,
    in_dims: Sequence[Any],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_activation: str,
    save_hidden: bool,
) -> tuple[tuple[Tensor, list[Tensor]], tuple[int | None, list[int | None]]]:
    """The rule of `relu_mlp::forward`."""
    x_dim, weight_dims, bias_dims = in_dims[:3]
    x = _to_front(x, x_dim)
    weights, biases = _all_to_front(weights, weight_dims), _all_to_front(biases, bias_dims)
    shape = x.shape[x_dim is not None : -1]
    are_same = all(dim is None for dim in [*weight_dims, *bias_dims])
    if not are_same or x.dim() == 1:  # else a batch dimension could pass for rows or features
        checks.check_layers(
            _one_of(x, x_dim),
            list(map(_one_of, weights, weight_dims)),
            list(map(_one_of, biases, bias_dims)),
        )
    if are_same:
        y, hidden = implementation_for(x).forward(
            x, weights, biases, output_activation, save_hidden
        )
        rows = math.prod(shape)
        hidden = [a.reshape(batch_size, rows, a.shape[1]) for a in hidden]
        return (y, hidden), (0, [0] * len(hidden))

    hidden = []
    a = _as_matrices(x, x_dim)
    for layer in range(len(weights)):
        a = _linear(a, weights[layer], reference.bias_of(biases, layer))
        if layer < len(weights) - 1:
            a = torch.relu(a)
            hidden.append(a)
    y = ACTIVATIONS[output_activation](a)
    hidden = hidden if save_hidden else []
    y = y.reshape(*y.shape[:-2], *shape, y.shape[-1])
    return (y, hidden), (_dim_of(y, len(shape) + 1), [_dim_of(a, 2) for a in hidden])


def relu_mlp(
    batch_size: int,
    in_dims: Sequence[Any],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_activation: str = "none",
) -> tuple[Tensor, int | None]:
    """The rule of `relu_mlp::relu_mlp`."""
    (y, _), (dim, _) = forward(batch_size, in_dims, x, weights, biases, output_activation, False)
    return y, dim


def backward(
    batch_size: int,
    in_dims: Sequence[Any],
    grad_output: Tensor,
    saved: Sequence[Tensor],
    output_activation: str,
    needs: str,
) -> tuple[list[Tensor], list[int | None]]:
    """The rule of `relu_mlp::backward`."""
    saved_dims = in_dims[1]
    y_dim, weight_dims, input_dims = reference.unpack(saved_dims, output_activation, needs)
    y, weights, inputs = reference.unpack(
        _all_to_front(saved, saved_dims), output_activation, needs
    )
    grad_output = _to_front(grad_output, in_dims[0])
    shape = grad_output.shape[in_dims[0] is not None : -1]
    delta = _as_matrices(grad_output, in_dims[0])
    y = None if y is None else _as_matrices(y, y_dim)
    inputs = [
        None if a is None else _as_matrices(a, dim)
        for a, dim in zip(inputs, input_dims, strict=True)
    ]

    # If only rows differ and nothing is summed over rows, all examples are one batch.
    of_rows = [delta, *([] if y is None else [y]), *inputs[1:]]
    if "1" not in needs[1:] and set(weight_dims) == {None} and all(t.dim() == 3 for t in of_rows):
        flat, *kept = [t.flatten(0, 1) for t in of_rows]
        at = 0 if y is None else 1
        kept[at:at] = weights
        (of_x,) = implementation_for(flat).backward(flat, kept, output_activation, needs)
        return [of_x.reshape(batch_size, *shape, of_x.shape[-1])], [0]

    layers, lowest = len(weights), reference.lowest_layer(needs)
    delta = ACTIVATION_BACKWARDS[output_activation](delta, y)
    of_weights: list[Tensor] = []
    of_biases: list[Tensor] = []
    for layer in reversed(range(lowest, layers)):
        if needs[1 + layer] == "1":
            of_weights.append(_transposed_product(delta, inputs[layer]))
        if needs[1 + layers + layer] == "1":
            of_biases.append(delta.sum(-2))
        if layer > lowest or needs[0] == "1":
            delta = delta @ weights[layer]
            if layer > 0:
                delta = select(*torch.broadcast_tensors(delta, inputs[layer]))
    grads = [*reversed(of_weights), *reversed(of_biases)]
    dims = [_dim_of(grad, 2) for grad in grads[: len(of_weights)]]
    dims += [_dim_of(grad, 1) for grad in grads[len(of_weights) :]]
    if needs[0] == "1":
        of_x = delta.reshape(*delta.shape[:-2], *shape, delta.shape[-1])
        grads.insert(0, of_x)
        dims.insert(0, _dim_of(of_x, len(shape) + 1))
    return grads, dims


def recompute_backward(
    batch_size: int,
    in_dims: Sequence[Any],
    grad_output: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_activation: str,
    needs: str,
) -> tuple[list[Tensor], list[int | None]]:
    """The rule of `relu_mlp::recompute_backward`: both passes by the rules above."""
    network = (x, weights, biases, output_activation, True)
    of_grad_output, x_dim, weight_dims = in_dims[:3]
    if any(map(_is_batched, in_dims[1:])):
        (y, hidden), (y_dim, hidden_dims) = forward(batch_size, in_dims[1:], *network)
    else:  # only grad_output is batched, as for many gradients of one forward pass
        y, hidden = implementation_for(x).forward(*network)
        y_dim, hidden_dims = None, [None] * len(hidden)
    saved = reference.pack(x, y, weights, hidden, output_activation, needs)
    dims = reference.pack(x_dim, y_dim, weight_dims, hidden_dims, output_activation, needs)
    return backward(
        batch_size, (of_grad_output, dims), grad_output, saved, output_activation, needs
    )


def _to_front(tensor: Tensor, dim: int | None) -> Tensor:
    return tensor.movedim(dim, 0) if dim else tensor


def _all_to_front(tensors: Sequence[Tensor], dims: Dims) -> list[Tensor]:
    return list(map(_to_front, tensors, dims))


def _one_of(tensor: Tensor, dim: int | None) -> Tensor:
    """One example of a tensor that `_to_front` returned, for its shape."""
    if dim is None:
        return tensor
    return tensor[0] if tensor.shape[0] else tensor.new_empty(tensor.shape[1:])


def _as_matrices(tensor: Tensor, dim: int | None) -> Tensor:
    """(*, features) as (rows, features), after the batch dimension if there is one."""
    if dim is None:
        return reference.as_matrix(tensor)
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:-1]), tensor.shape[-1])


def _dim_of(tensor: Tensor, dims: int) -> int | None:
    """The batch dimension of a result that has `dims` dimensions without it."""
    return None if tensor.dim() == dims else 0


def _linear(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.dim() == 2 and (bias is None or bias.dim() == 1):
        return F.linear(a, weight, bias)
    z = a @ weight.mT
    return z if bias is None else z + (bias if bias.dim() == 1 else bias[:, None, :])


def _transposed_product(delta: Tensor, a: Tensor) -> Tensor:
    """delta^T a; for one row, where nothing is summed, in one pass over memory."""
    return delta.mT * a if a.shape[-2] == 1 else delta.mT @ a
