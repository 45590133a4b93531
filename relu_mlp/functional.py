"""The functional form, and which calls the operators may serve."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import is_tensor_like

from . import autocast, autograd, checks, reference
from ._torch_private import (
    FORWARD_AD,
    KNOWS_TRANSFORMS,
    LEVEL,
    FakeTensor,
    are_functorch_transforms_active,
    below_autograd,
    constant_in_a_graph,
    disable_autocast,
    get_tracing_state,
    is_any_autocast_enabled,
)
from .activations import ACTIVATION_NAMES, CHOICES, FUNCTIONS, OutputActivation
from .checks import DTYPES
from .interception import (
    are_functions_replaced,
    dispatch_modes,
    function_modes,
    is_under_a_mode,
)
from .ops import (
    NO_TENSOR,
    PLAIN,
    carries_tangent,
    implementation_for,
    node,
    stand_ins,
    this_thread,
)

Loss = Literal["sse", "half_sse", "mse", "l1", "huber", "bce_with_logits", "cross_entropy"]

if get_args(Loss) != tuple(reference.LOSSES):
    raise ImportError("Loss and reference.LOSSES must have the same names in the same order")

# Bound here, because looking them up in every call takes a microsecond.
_strided = torch.strided
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_is_exporting = torch.compiler.is_exporting


def relu_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    output_activation: OutputActivation | None = None,
    recompute: bool = False,
) -> Tensor:
    """A multilayer perceptron with ReLU between its layers, as one operator.

    Equal to::

        for weight, bias in zip(weights, biases):
            x = F.relu(F.linear(x, weight, bias))   # no ReLU after the last

    followed by the output activation. It behaves like that code in every respect: dtypes,
    autocast, gradients of every order, in-place checks.

    Args:
        x: (*, in_features), of dtype float64, float32, bfloat16 or float16. Other dtypes and
            tensor subclasses take the native path.
        weights: one (out_features, in_features) tensor for each layer, as in `torch.nn.Linear`,
            with the dtype and device of x.
        biases: None, or a sequence with None or an (out_features,) tensor for each layer.
        output_activation: None, ``"relu"``, ``"sigmoid"``, ``"tanh"`` or another name of
            `activations.OutputActivation`.
        recompute: whether to save no hidden activations, and compute them again in the backward
            pass.

    Returns:
        (*, out_features), contiguous, in the dtype of x (under autocast, in that of `F.linear`).
        Any size may be 0.

    Raises:
        TypeError: if x, a weight or a bias is not a tensor.
        ValueError: if there are no weights, if `biases` and `weights` differ in length, or if the
            activation is unknown.
        RuntimeError: if shapes do not chain, if dtypes or devices differ, if a storage was freed,
            or if the backend ``"extension"`` can't serve the call.
    """
    activation = activation_name(output_activation)
    weights, present = checked_parameters(x, weights, biases)
    if (
        is_served(x)
        and all(map(is_plain, weights))
        and all(map(is_plain, present))
        and not are_functions_replaced()
    ):
        return call_operators(x, weights, present, activation, recompute)
    return native(x, weights, present, activation)


def activation_name(output_activation: str | None) -> str:
    """The operators' name of an output activation; ValueError if there is none."""
    try:
        return ACTIVATION_NAMES[output_activation]
    except (KeyError, TypeError):
        raise ValueError(
            f"output_activation must be {CHOICES}, got {output_activation!r}"
        ) from None


def checked_parameters(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The weights and biases as the operators take them.

    Makes the checks that the operators can't make: types, lengths, and biases without elements,
    which an operator treats as missing.
    """
    is_symbolic = not isinstance(x, Tensor)  # as in a trace of torch.fx
    if is_symbolic and not is_tensor_like(x):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    weights = list_of_tensors("weights", weights)
    if not weights:
        raise ValueError("weights must have at least one entry, got none")
    if biases is None:
        return weights, []
    present = [
        NO_TENSOR if bias is None else bias
        for bias in list_of_tensors("biases", biases, or_none=True)
    ]
    if len(present) != len(weights):
        raise ValueError(
            f"biases must have one entry for each of the {len(weights)} weights, got {len(present)}"
        )
    if not is_symbolic:
        check_empty_biases(weights, present)
    return weights, present


def check_empty_biases(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    """Raises RuntimeError for a bias without elements where the layer has outputs.

    An operator would treat it as a missing bias.
    """
    # In a TorchScript trace numel() is a tensor, and a symbolic size has no nbytes.
    is_traced = get_tracing_state() is not None
    for layer, bias in enumerate(biases):
        if (
            bias is not NO_TENSOR
            and (bias.nbytes if is_traced else bias.numel()) == 0
            and bias.shape != weights[layer].shape[:1]
        ):
            raise RuntimeError(
                f"biases[{layer}] must have shape ({weights[layer].shape[0]},), "
                f"got {tuple(bias.shape)}"
            )


def list_of_tensors(argument: str, value: object, or_none: bool = False) -> list[Any]:
    """The items of a sequence of tensors; TypeError if it is something else."""
    # A Tensor is iterable too, but its items would be its rows.
    if isinstance(value, Tensor) or not hasattr(value, "__iter__"):
        kinds = "Tensors or None" if or_none else "Tensors"
        raise TypeError(f"{argument} must be a sequence of {kinds}, got {type(value).__name__}")
    items = list(value)
    if PLAIN.issuperset(map(type, items)):  # the usual case, checked in C
        return items
    for n, item in enumerate(items):
        if not (isinstance(item, Tensor) or is_tensor_like(item) or (or_none and item is None)):
            raise TypeError(f"{argument}[{n}] must be a Tensor, got {type(item).__name__}")
    return items


def is_plain(tensor: object) -> bool:
    """Whether this is an ordinary dense tensor: no subclass, no other layout."""
    if type(tensor) not in PLAIN and not _is_exported(tensor):
        return False
    return tensor.layout is _strided  # type: ignore[attr-defined]


def _is_exported(tensor: object) -> bool:
    """Whether `torch.export` has put this in the place of an ordinary tensor."""
    return type(tensor) is FakeTensor and _is_compiling()


def is_served(x: Tensor) -> bool:
    """Whether the operators can serve this input exactly as the native path would.

    Tensor subclasses, other layouts and other dtypes take the native path. So do calls under
    a mode that has to see the native layers' operations.
    """
    return (
        # Modes come first, because a mode sees every read of an attribute.
        not ((function_modes() or dispatch_modes()) and is_under_a_mode())
        and (type(x) in PLAIN or _is_exported(x))
        and x.dtype in DTYPES
        and x.layout is _strided
        and not x.is_nested
    )


@constant_in_a_graph
def leaves_python() -> bool:
    """Whether PyTorch is making a graph that may be used without this package.

    Such a graph is a program of `torch.export`, a TorchScript trace or an ONNX file. It gets the
    native layers, as from an `nn.Sequential`, and not this package's operator.
    ``backend("extension")`` requests the operator nevertheless, except in an ONNX file. A graph
    of `torch.compile` stays in the process.
    """
    if not (_is_compiling() and _is_exporting()) and get_tracing_state() is None:
        return False
    return this_thread.backend != "extension" or torch.onnx.is_in_onnx_export()


def call_operators(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    recompute: bool,
    children: Iterable[nn.Module] = (),
) -> Tensor:
    """Runs a network with the operators, or natively in graphs that leave the process.

    Args:
        x, weights, biases: tensors that passed `is_served` and `is_plain`; biases as
            `checked_parameters` returns them.
        activation: the operators' name of the output activation.
        recompute: as in `relu_mlp`.
        children: the modules that the network consists of. A trace calls them, so that it
            has their names.
    """
    if _is_compiling() or get_tracing_state() is not None:
        if leaves_python() and children:
            for child in children:
                x = child(x)
            return x
        if leaves_python() or implementation_for(x) is reference:
            return native(x, weights, biases, activation)
        return torch.ops.relu_mlp.relu_mlp(x, weights, biases, activation)
    if node is not None:
        output = node.relu_mlp(x, weights, biases, activation, recompute)
        if output is not NotImplemented:
            return output
    implementation = implementation_for(x)
    if FORWARD_AD[LEVEL] >= 0 or are_functorch_transforms_active():
        # Through the dispatcher, which runs one level after the other.
        return torch.ops.relu_mlp.relu_mlp(x, weights, stand_ins(biases), activation)
    if is_any_autocast_enabled():
        x, weights, biases = autocast.cast(x, weights, biases)
    if _is_grad_enabled():
        call = (implementation, activation, recompute, len(weights))
        return autograd.apply(call, x, *weights, *biases)[0]
    # The guard is active from its creation. `with` would take longer.
    guard = below_autograd()
    try:
        return implementation.relu_mlp(x, weights, biases, activation)
    finally:
        del guard


def refuse_transforms(function: str, *arguments: Any) -> None:
    """Raises RuntimeError under a transform, for a function that has no derivative."""
    if (KNOWS_TRANSFORMS and are_functorch_transforms_active()) or (
        FORWARD_AD[LEVEL] >= 0 and carries_tangent(*arguments)
    ):
        raise RuntimeError(
            f"{function} has no derivative, and is called under a functorch transform or with "
            "a forward-mode tangent. Differentiate a function of relu_mlp(...) instead."
        )


def has_other_dtype(x: Tensor) -> bool:
    """Whether x is an ordinary tensor of a dtype that the operators don't support, such as int64.

    The native path serves it, after a check of the arguments, because PyTorch's own message about
    a weight of another dtype would not name the argument.
    """
    return (
        type(x) in PLAIN
        and not is_under_a_mode()
        and x.dtype not in DTYPES
        and get_tracing_state() is None
        # Autocast converts a float8 first.
        and not (x.is_floating_point() and is_any_autocast_enabled())
    )


def native(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str
) -> Tensor:
    """The same network with PyTorch's own layers."""
    if has_other_dtype(x) and x.dim():
        checks.check_chain(x, weights, biases)
    for layer, weight in enumerate(weights):
        bias = biases[layer] if biases and biases[layer] is not NO_TENSOR else None
        x = F.linear(x, weight, bias)
        if layer < len(weights) - 1:
            x = F.relu(x)
    if activation == "none":
        return x
    phi: Any = torch  # looked up in every call, because somebody may have replaced it
    for name in FUNCTIONS[activation].split("."):
        phi = getattr(phi, name)
    return phi(x)


class LossAndGrads(NamedTuple):
    """The result of `loss_and_grads`. All tensors have the dtype and device of x."""

    loss: Tensor  #: of shape ()
    weights: tuple[Tensor, ...]  #: d loss / d W_l, with the shape of each weight
    #: d loss / d b_l, with the shape of each bias, or None for a missing bias; None without biases
    biases: tuple[Tensor | None, ...] | None


def loss_and_grads(
    x: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    loss: Loss = "sse",
    output_activation: OutputActivation | None = None,
) -> LossAndGrads:
    """The loss of a network and its gradients with respect to all parameters, in one call.

    The gradients are computed by hand (the formulas are in reference.py), without an autograd
    graph. This is for training loops written by hand. With y = `relu_mlp(x, weights, biases)`, the
    loss is

        ``"sse"``              the sum of (y - target)^2
        ``"half_sse"``         half of that sum
        ``"mse"``              the mean of (y - target)^2 over all elements
        ``"l1"``               the mean of |y - target|, `F.l1_loss`
        ``"huber"``            the mean of (y - target)^2 / 2 where |y - target| < 1, and of
                               |y - target| - 1/2 elsewhere: `F.huber_loss`
        ``"bce_with_logits"``  `F.binary_cross_entropy_with_logits`: the mean of
                               -target log(p) - (1 - target) log(1 - p) with p = sigmoid(y)
        ``"cross_entropy"``    `F.cross_entropy`: the mean over the rows of -log(p) at the class of
                               the row, with p = softmax(y)

    On the CPU the outputs of all rows never exist at once, whatever the loss.

    Args:
        x, weights, biases, output_activation: as in `relu_mlp`. For cross entropy x is
            (rows, in_features) or (in_features,).
        target: (*, out_features), the shape of y, with the dtype and device of x. Integers and
            bools are converted to the dtype of x. For cross entropy such a target has
            probabilities, and classes are int64 (or uint8) of shape (*): from 0 to
            out_features - 1, or -100 for a row that is left out of the mean.
        loss: the name of the loss.

    Returns:
        `LossAndGrads(loss, weights, biases)`: a 0-dimensional tensor, and two tuples of gradients
        with the shapes of the parameters. `biases` is None if no biases were given, and an entry
        is None for a missing bias. No result requires a gradient. Autocast does not apply.

    Raises:
        TypeError: as in `relu_mlp`, or if `target` is not a tensor.
        ValueError: as in `relu_mlp`, or if the loss is unknown.
        RuntimeError: as in `relu_mlp`; if `target` has another shape, dtype or device; if x has
            more than two dimensions for cross entropy; or under `torch.func` and forward-mode
            differentiation.
        IndexError: for a class out of bounds on the CPU; on a GPU PyTorch's kernels report it.
    """
    if is_any_autocast_enabled():
        with disable_autocast():
            return loss_and_grads(
                x, target, weights, biases, loss=loss, output_activation=output_activation
            )
    activation = activation_name(output_activation)
    if not isinstance(loss, str) or loss not in reference.LOSSES:
        raise ValueError(f"loss must be {checks.listed(reference.LOSSES)}, got {loss!r}")
    weight_list, present = checked_parameters(x, weights, biases)
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a Tensor, got {type(target).__name__}")
    refuse_transforms("loss_and_grads", x, target, weight_list, present)
    target = converted_target(loss, target, x)
    biases = present if type(x) in PLAIN else stand_ins(present)
    with below_autograd():
        value, grads = implementation_for(x).loss_and_grads(
            x, target, weight_list, biases, loss, activation
        )
    return LossAndGrads(value, *split_by_kind(grads, present))


def converted_target(loss: str, target: Tensor, x: Tensor) -> Tensor:
    """The target in the dtype that the operators take."""
    if loss == "cross_entropy":
        # uint8 is PyTorch's other dtype of classes.
        return target.long() if target.dtype is torch.uint8 else target
    if target.dtype is x.dtype or target.is_floating_point() or target.is_complex():
        return target
    return target.to(x.dtype)


def split_by_kind(
    of_parameters: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...] | None]:
    """Splits a sequence into the entries of the weights and of the biases; None for a missing one.

    Args:
        of_parameters: an entry for each weight, then one for each of `biases`.
        biases: as `checked_parameters` returns them.
    """
    layers = len(of_parameters) - len(biases)
    of_weights, of_biases = tuple(of_parameters[:layers]), of_parameters[layers:]
    if not biases:
        return of_weights, None
    return of_weights, tuple(
        None if bias is NO_TENSOR else entry for bias, entry in zip(biases, of_biases, strict=True)
    )
