"""The mathematics in plain PyTorch. Read this file first. It is also the fallback.

A network of L layers maps x = a_0 to y:

    z_l = a_{l-1} W_l^T + b_l          l = 1 ... L
    a_l = max(z_l, 0)                  l < L
    y   = phi(z_L)                     phi: the output activation (activations.py)

and its backward pass carries delta_l = d loss / d z_l downwards:

    delta_L       = d loss / d y * phi'(z_L)
    d loss / d W_l = delta_l^T a_{l-1}
    d loss / d b_l = sum of delta_l over the rows
    delta_{l-1}   = delta_l W_l where a_{l-1} > 0 or is NaN, and 0 elsewhere
    d loss / d x  = delta_1 W_1

phi' is written in terms of y, so no z is kept. The mask of the ReLU selects
and does not multiply: an infinite gradient at a unit that is off gives 0.

The functions `relu_mlp`, `forward`, `backward`, `backward_vjp`, `recompute_backward` and
`loss_and_grads` have the signatures of the operators of those names and can replace
them. `jvp` is the same derivative in forward mode, and `jacobian` is the derivative of
all outputs at once. The second derivative is in second_order.py. All functions consist of
differentiable operations. In the code, layers are counted from 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from ._torch_private import unsafe_view
from .activations import ACTIVATION_BACKWARDS as ACTIVATION_BACKWARDS
from .activations import ACTIVATIONS as ACTIVATIONS
from .activations import select as select

#: A row of this class has no cross entropy.
IGNORED_CLASS = -100


def cross_entropy_backward(y: Tensor, target: Tensor) -> Tensor:
    """The gradient of the mean cross entropy at y, (rows, classes) or (classes,).

    With p = softmax(y) of each row and N rows,

        target of probabilities t:   (p * sum of t over the row - t) / N
        target of classes c:         (p - 1 at c, and p elsewhere) / N

    where N counts the rows whose class is not IGNORED_CLASS. The others have a gradient of 0, or
    NaN where p is NaN, as in PyTorch.
    """
    p = torch.softmax(y, -1)
    if not has_classes("cross_entropy", target):
        rows = max(1, target.shape[:-1].numel())
        return (p * target.sum(-1, keepdim=True) - target) / rows
    is_counted = target != IGNORED_CLASS
    columns = torch.arange(y.shape[-1], device=y.device)
    slope = p - (columns == target[..., None]).to(p.dtype)
    return slope * is_counted[..., None] / is_counted.sum().clamp(min=1)


#: (y, target) -> the loss, by its name.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sse": lambda y, target: (y - target).square().sum(),
    "half_sse": lambda y, target: 0.5 * (y - target).square().sum(),
    "mse": lambda y, target: (y - target).square().mean(),
    "l1": lambda y, target: (y - target).abs().mean(),
    "huber": lambda y, target: F.huber_loss(y, target),
    "bce_with_logits": lambda y, target: F.binary_cross_entropy_with_logits(y, target),
    "cross_entropy": lambda y, target: F.cross_entropy(y, target),
}

#: (y, target) -> the gradient of the loss at y.
LOSS_BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sse": lambda y, target: 2 * (y - target),
    "half_sse": lambda y, target: y - target,
    "mse": lambda y, target: (2 / max(1, y.numel())) * (y - target),
    "l1": lambda y, target: (1 / max(1, y.numel())) * torch.sign(y - target),
    "huber": lambda y, target: (1 / max(1, y.numel())) * (y - target).clamp(-1, 1),
    "bce_with_logits": lambda y, target: (torch.sigmoid(y) - target) / max(1, y.numel()),
    "cross_entropy": cross_entropy_backward,
}


def has_classes(loss: str, target: Tensor) -> bool:
    """Whether the target of a loss has a class for each row, and not values."""
    return loss == "cross_entropy" and target.dtype == torch.int64


def as_matrix(tensor: Tensor) -> Tensor:
    """(*, features) as (rows, features)."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def bias_of(biases: Sequence[Tensor], layer: int) -> Tensor | None:
    """The bias of a layer; an empty list or a tensor without elements means none."""
    return biases[layer] if biases and biases[layer].numel() else None


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_activation: str,
    save_hidden: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The forward pass.

    Args:
        x: (*, in_features).
        weights: L tensors (out_features, in_features).
        biases: nothing, or L tensors (out_features,); one without elements is
            a missing bias.
        output_activation: ``"none"`` or a name of `activations.ROWS`, as ``"tanh"``.
        save_hidden: whether to return the hidden activations.

    Returns:
        y (*, out_features) and [a_1, ..., a_{L-1}], each (rows, features).
    """
    checks.check_layers(x, weights, biases)
    checks.check_name("output_activation", output_activation, ACTIVATIONS)
    hidden = []
    a = as_matrix(x)
    for layer in range(len(weights)):
        a = F.linear(a, weights[layer], bias_of(biases, layer))
        if layer < len(weights) - 1:
            a = torch.relu(a)
            hidden.append(a)
    y = ACTIVATIONS[output_activation](a)
    if x.dim() != 2:
        # Not a view in autograd's eyes, so that y may be changed in place.
        y = unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
    return y, hidden if save_hidden else []


def relu_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_activation: str = "none",
) -> Tensor:
    """The forward pass when there will be no backward pass. Arguments are as in `forward`."""
    return forward(x, weights, biases, output_activation, False)[0]


def needs_of(x: bool, weights: Sequence[bool], biases: Sequence[bool]) -> str:
    """Which gradients are wanted, as `backward` takes it: of x, each weight, each bias.

    `biases` may be empty, which is a network without biases.
    """
    flags = [x, *weights, *(biases or [False] * len(weights))]
    return "".join("01"[flag] for flag in flags)


def lowest_layer(needs: str) -> int:
    """The lowest layer with a gradient to compute: nothing is propagated below it."""
    layers = len(needs) // 2
    if needs[0] == "1":
        return 0
    wanted = zip(needs[1 : 1 + layers], needs[1 + layers :], strict=True)
    return next((layer for layer, pair in enumerate(wanted) if "1" in pair), layers)


def is_kept(output_activation: str, needs: str) -> list[bool]:
    """Which of (x, y, *weights, *hidden) the wanted gradients depend on.

    This is what is saved for the backward pass, and it is what the native path
    saves. `needs` is as in `backward`.
    """
    layers = len(needs) // 2
    lowest = lowest_layer(needs)
    return [
        needs[1] == "1",
        lowest < layers and output_activation != "none",
        *[layer > lowest or needs[0] == "1" for layer in range(layers)],
        *[layer > lowest or needs[1 + layer] == "1" for layer in range(1, layers)],
    ]


def pack(
    x: Any,
    y: Any,
    weights: Iterable[Any],
    hidden: Iterable[Any],
    output_activation: str,
    needs: str,
) -> list[Any]:
    """Those of (x, y, *weights, *hidden) that `is_kept` names; `unpack` is the inverse."""
    kept = is_kept(output_activation, needs)
    return list(itertools.compress([x, y, *weights, *hidden], kept))


def unpack(saved: Sequence[Any], output_activation: str, needs: str) -> tuple[Any, Any, Any]:
    """y, the weights, and the inputs of the layers x, a_1, ..., a_{L-1}; None where not kept."""
    layers = len(needs) // 2
    kept = is_kept(output_activation, needs)
    if len(saved) != sum(kept):
        raise RuntimeError(
            f"relu_mlp::backward: needs {needs} asks for {sum(kept)} tensors in saved, "
            f"got {len(saved)}"
        )
    remaining = iter(saved)
    x, y, *rest = [next(remaining) if is_there else None for is_there in kept]
    return y, rest[:layers], [x, *rest[layers:]]


def backward(
    grad_output: Tensor,
    saved: Sequence[Tensor],
    output_activation: str,
    needs: str,
    grad_hidden: Sequence[Tensor | None] = (),
) -> list[Tensor]:
    """The backward pass.

    Args:
        grad_output: d loss / d y, (*, out_features).
        saved: those of (x, y, *weights, *hidden) that `is_kept` names.
        output_activation: as in `forward`.
        needs: 1 + 2 L characters, ``"1"`` where the gradient of x, of each
            weight, of each bias is wanted, and ``"0"`` elsewhere.
        grad_hidden: gradients that reach a_1, ..., a_{L-1} from elsewhere, as
            they do in a second derivative.

    Returns:
        The wanted gradients, in the order of `needs`, and no others.
    """
    checks.check_needs("backward", needs)
    checks.check_grad_output("backward", grad_output)
    layers = len(needs) // 2
    needs_x, needs_weight, needs_bias = needs[0], needs[1 : 1 + layers], needs[1 + layers :]
    lowest = lowest_layer(needs)
    if lowest == layers:
        return []
    checks.check_saved(saved, grad_output)
    checks.check_name("output_activation", output_activation, ACTIVATIONS)
    y, weights, inputs = unpack(saved, output_activation, needs)
    grad, y = as_matrix(grad_output), None if y is None else as_matrix(y)
    if inputs[0] is not None:
        inputs[0] = as_matrix(inputs[0])
    checks.check_operands(grad, y, weights, inputs)
    grad_weights: list[Tensor] = []
    grad_biases: list[Tensor] = []

    delta = ACTIVATION_BACKWARDS[output_activation](grad, y)
    for layer in reversed(range(lowest, layers)):
        if needs_weight[layer] == "1":
            grad_weights.append(delta.T @ inputs[layer])
        if needs_bias[layer] == "1":
            grad_biases.append(delta.sum(0))
        if layer > lowest or needs_x == "1":
            delta = delta @ weights[layer]
            if layer > 0:
                if grad_hidden and grad_hidden[layer - 1] is not None:
                    delta = delta + grad_hidden[layer - 1]
                delta = select(delta, inputs[layer])

    grads = [*reversed(grad_weights), *reversed(grad_biases)]
    if needs_x == "1":
        grads.insert(0, delta.reshape(*grad_output.shape[:-1], delta.shape[1]))
    return grads


def backward_vjp(
    grad_output: Tensor,
    saved: Sequence[Tensor],
    output_activation: str,
    needs: str,
    cotangents: Sequence[Tensor],
    given: str,
    wanted: str,
) -> list[Tensor]:
    """The vector-Jacobian product of `backward`. second_order.py has the formulas.

    Args:
        grad_output, saved, output_activation, needs: as in `backward`.
        cotangents: gradients that reach the results of `backward`, those that are not 0.
        given: ``"1"`` for each result of `backward` that has one, and ``"0"`` for the others.
        wanted: ``"1"`` where the gradient at grad_output, at each of `saved`, is wanted, and
            ``"0"`` elsewhere.

    Returns:
        The wanted gradients, in the order of `wanted`, and no others.
    """
    from . import second_order  # which imports this file

    checks.check_needs("backward_vjp", needs)
    checks.check_grad_output("backward_vjp", grad_output)
    checks.check_flags("given", given, needs.count("1"))
    checks.check_flags("wanted", wanted, 1 + len(saved))
    if len(cotangents) != given.count("1"):
        raise RuntimeError(
            f"relu_mlp::backward_vjp: given {given!r} asks for {given.count('1')} "
            f"tensors in cotangents, got {len(cotangents)}"
        )
    checks.check_saved(saved, grad_output)
    checks.check_name("output_activation", output_activation, ACTIVATIONS)
    y, weights, (x, *hidden) = unpack(saved, output_activation, needs)
    y, x = (None if t is None else as_matrix(t) for t in (y, x))
    checks.check_operands(as_matrix(grad_output), y, weights, [x, *hidden])
    widths = [None if a is None else a.shape[1] for a in (x, *hidden)] + [grad_output.shape[-1]]
    shapes = [
        (*grad_output.shape[:-1], None if weights[0] is None else weights[0].shape[1]),
        *[(width, below) for below, width in itertools.pairwise(widths)],
        *[(width,) for width in widths[1:]],
    ]  # of the gradients of x, every weight and every bias, where they are needed
    shapes = list(itertools.compress(shapes, map(int, needs)))
    checks.check_cotangents(cotangents, itertools.compress(shapes, map(int, given)), grad_output)
    grads: list[Tensor | None] = [None] * (1 + len(saved))
    if cotangents:
        remaining = iter(cotangents)
        of_results = [next(remaining) if flag == "1" else None for flag in given]
        grads = second_order.backward_vjp(
            as_matrix(grad_output),
            list(map(as_matrix, saved)),
            output_activation,
            needs,
            of_results,
        )
    # Zeros in MKLDNN's layout are more than PyTorch allocates memory for.
    return [
        tensor.new_zeros(tensor.shape, layout=torch.strided)
        if grad is None
        else grad.reshape(tensor.shape).contiguous()
        for grad, tensor, flag in zip(grads, [grad_output, *saved], wanted, strict=True)
        if flag == "1"
    ]


def recompute_backward(
    grad_output: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_activation: str,
    needs: str,
) -> list[Tensor]:
    """The backward pass when only x and the parameters were saved.

    Args:
        grad_output, needs: as in `backward`.
        x, weights, biases, output_activation: as in `forward`.

    Returns:
        As `backward`.
    """
    checks.check_layers(x, weights, biases)
    checks.check_needs("recompute_backward", needs, len(weights))
    checks.check_grad_output("recompute_backward", grad_output)
    y, hidden = forward(x, weights, biases, output_activation, True)
    checks.check_like_output("grad_output", grad_output, x, y.shape)
    saved = pack(x, y, weights, hidden, output_activation, needs)
    return backward(grad_output, saved, output_activation, needs)


def loss_and_grads(
    x: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    loss: str,
    output_activation: str,
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients with respect to all weights, then to all biases.

    With y (*, out_features), e = y - target, and means over all elements, the losses are

        ``"sse"``              sum of e^2
        ``"half_sse"``         half of that sum
        ``"mse"``              mean of e^2
        ``"l1"``               mean of |e|
        ``"huber"``            mean of e^2 / 2 where |e| < 1, and of |e| - 1/2 elsewhere
        ``"bce_with_logits"``  mean of -target log(p) - (1 - target) log(1 - p), p = sigmoid(y)
        ``"cross_entropy"``    mean over the rows of -(sum of t log(p) over the row), p = softmax(y)

    and `LOSS_BACKWARDS` has their gradients at y. `target` has the shape of y. For cross entropy
    its rows are the probabilities t, or it has a class for each row, int64 of the shape of x
    without its last dimension: t is then 1 at the class and 0 elsewhere, and rows of the class
    IGNORED_CLASS are left out. x is then (rows, in_features) or (in_features,).

    The other arguments are as in `forward`. The gradient of a missing bias has no elements.
    """
    return loss_and_grads_between(
        forward, backward, x, target, weights, biases, loss, output_activation
    )


def loss_and_grads_between(
    forward: Callable[..., tuple[Tensor, list[Tensor]]],
    backward: Callable[..., list[Tensor]],
    x: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    loss: str,
    output_activation: str,
) -> tuple[Tensor, list[Tensor]]:
    """`loss_and_grads` with the loss between these two passes, which may be the library's."""
    checks.check_layers(x, weights, biases)
    checks.check_name("loss", loss, LOSSES)
    checks.check_target(target, x, weights, has_classes(loss, target), loss)
    y, hidden = forward(x, weights, biases, output_activation, True)
    grad_output = LOSS_BACKWARDS[loss](y, target)
    has_bias = [bias_of(biases, layer) is not None for layer in range(len(weights))]
    needs = needs_of(False, [True] * len(weights), has_bias)
    saved = pack(x, y, weights, hidden, output_activation, needs)
    grads = iter(backward(grad_output, saved, output_activation, needs))
    return LOSSES[loss](y, target), [
        next(grads) if present else x.new_empty(0)
        for present in [True] * len(weights) + has_bias[: len(biases)]
    ]


def jvp(
    x: Tensor,
    y: Tensor,
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
    output_activation: str,
    x_tangent: Tensor | None,
    weight_tangents: Sequence[Tensor | None],
    bias_tangents: Sequence[Tensor | None],
) -> tuple[Tensor, list[Tensor]]:
    """The forward-mode derivative: the change of y when x and the parameters change.

    With a prime for a change,

        z_l' = a_{l-1}' W_l^T + a_{l-1} W_l'^T + b_l'
        a_l' = z_l' where a_l > 0 or is NaN, and 0 elsewhere
        y'   = phi'(z_L) * z_L'

    Args:
        x, y, weights, hidden, output_activation: as `forward` took and returned
            them, x and y as matrices.
        x_tangent: x', (rows, in_features); None is 0, here and below.
        weight_tangents: W_l', of the shape of each weight.
        bias_tangents: b_l', one for each weight.

    Returns:
        y', (rows, out_features), and [a_1', ..., a_{L-1}'].
    """
    tangents = propagate_tangents([x, *hidden], weights, x_tangent, weight_tangents, bias_tangents)
    changes = [
        a.new_zeros(a.shape) if tangent is None else tangent
        for a, tangent in zip([*hidden, y], tangents[1:], strict=True)
    ]
    return ACTIVATION_BACKWARDS[output_activation](changes[-1], y), changes[:-1]


def propagate_tangents(
    inputs: Sequence[Any],
    weights: Sequence[Any],
    x_tangent: Tensor | None,
    weight_tangents: Sequence[Tensor | None],
    bias_tangents: Sequence[Tensor | None],
    lowest: int = 0,
    rows: int | None = None,
) -> list[Tensor | None]:
    """x', a_1', ..., a_{L-1}' and z_L' by the formulas of `jvp`; None is 0 throughout.

    Nothing changes below the layer `lowest`, whose `inputs` and `weights` may be None.
    `rows` are those of x.
    """
    rows = inputs[0].shape[0] if rows is None else rows
    tangents: list[Tensor | None] = [*[None] * lowest, x_tangent]
    for layer in range(lowest, len(weights)):
        tangent, weight_tangent = tangents[layer], weight_tangents[layer]
        z_tangent = bias_tangents[layer]
        if weight_tangent is not None:
            z_tangent = F.linear(as_matrix(inputs[layer]), weight_tangent, z_tangent)
        elif z_tangent is not None:
            z_tangent = z_tangent.repeat(rows, 1)  # memory of its own, as it may be the result
        if tangent is not None:
            product = tangent, weights[layer].T
            z_tangent = torch.mm(*product) if z_tangent is None else z_tangent.addmm(*product)
        if layer < len(weights) - 1 and z_tangent is not None:
            z_tangent = select(z_tangent, inputs[layer + 1])
        tangents.append(z_tangent)
    return tangents


def jacobian(
    x: Tensor,
    y: Tensor,
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
    output_activation: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """The derivative of every output of every row with respect to every parameter.

    This is the backward pass with a delta for each output: delta_l[n, o] is the gradient
    of y[n, o] with respect to row n of z_l. Rows do not mix, so nothing is summed over them:

        delta_L[n, o, i]             = phi'(z_L)[n, o] where i = o, else 0
        d y[n, o] / d W_l[i, j]      = delta_l[n, o, i] a_{l-1}[n, j]
        d y[n, o] / d b_l[i]         = delta_l[n, o, i]
        delta_{l-1}[n, o]            = delta_l[n, o] W_l where a_{l-1}[n] > 0 or is NaN, else 0

    Args:
        x, y, weights, hidden, output_activation: as `forward` took and returned
            them, x and y as matrices.

    Returns:
        One (rows, out_features, *weight.shape) for each weight, and one
        (rows, out_features, weight.shape[0]) for the bias of each.
    """
    inputs = [x, *hidden]
    weight_jacobians: list[Tensor] = []
    bias_jacobians: list[Tensor] = []
    slope = ACTIVATION_BACKWARDS[output_activation](torch.ones_like(y), y)
    delta = torch.diag_embed(slope)
    for layer in reversed(range(len(weights))):
        weight_jacobians.append(delta[:, :, :, None] * inputs[layer][:, None, None, :])
        bias_jacobians.append(delta)
        if layer > 0:
            is_off = inputs[layer] <= 0
            delta = (delta @ weights[layer]).masked_fill(is_off[:, None, :], 0)
    return weight_jacobians[::-1], bias_jacobians[::-1]
