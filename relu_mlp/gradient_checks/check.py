"""`check_gradients`: a derivation compared with autograd and with central differences.

The same gradient is computed in three ways, in double precision: by hand, by autograd, and
numerically, from the function's values at a step to either side. The first two must agree to
rounding. The third loses a third of its digits or more, and means nothing if the function has
a kink within the step. It is there because it shares no code with the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, overload

import torch
from torch import Tensor

from .. import reference
from ..activations import OutputActivation
from ..functional import (
    Loss,
    activation_name,
    checked_parameters,
    loss_and_grads,
    native,
)
from ..ops import NO_TENSOR
from .arguments import Backward, Inputs, listed_gradients, named_inputs
from .comparison import compared
from .differences import Function
from .report import GradientReport


@overload
def check_gradients(
    x: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    loss: Loss = "sse",
    output_activation: OutputActivation | None = None,
    eps: float | None = None,
) -> GradientReport: ...


@overload
def check_gradients(
    function: Function, inputs: Inputs, backward: Backward, /, *, eps: float | None = None
) -> GradientReport: ...


def check_gradients(
    x: Any,
    target: Any,
    weights: Any,
    biases: Any = None,
    *,
    loss: Loss = "sse",
    output_activation: OutputActivation | None = None,
    eps: float | None = None,
) -> GradientReport:
    """Compares a gradient derived by hand with autograd's and with a numerical one.

    For this package's network, it compares `loss_and_grads` with autograd of PyTorch's own
    layers::

        print(check_gradients(x, target, weights, biases, loss="sse"))

    For a derivation of your own, pass a function and its backward pass::

        def loss(w, b):
            return ((x @ w.T + b - target) ** 2).sum()

        def backward(w, b):
            delta = 2 * (x @ w.T + b - target)
            return delta.T @ x, delta.sum(0)

        print(check_gradients(loss, [w, b], backward))

    The check runs in float64, whatever the dtype of the inputs: a difference in float32 has
    two digits. The numerical gradient is the central difference

        (f(p + h) - f(p - h)) / 2 h,    h = eps * max(1, |p|)

    A second difference, with 2 h, and f(p) tell how far the first may be off, and whether the
    function has a kink nearby, where the difference means nothing. At most 4096 elements of a
    parameter get a numerical gradient.

    By hand and autograd must agree to rounding, however large the function's value is. They
    may differ by 1e-9 of the element, or, where its terms cancel, by the effect of a few
    dozen roundings.

    Args:
        x, target, weights, biases, loss, output_activation: as in `loss_and_grads`.
        function: takes the inputs and returns a tensor of one element, computed by
            differentiable operations.
        inputs: tensors, in the order of the function's arguments or as a mapping by their
            names. Floating-point inputs are checked; both functions get them in float64.
        backward: takes the same inputs and returns their gradients in the same order or
            under the same names. None stands for a gradient that was not derived; one must
            be there. With one input, it may return the gradient alone.
        eps: the step; by default the cube root of float64's precision, 6e-6.

    Returns:
        A `GradientReport`: `.ok`, `.max_error`, `.parameters`, `.worst()`, and
        `print` for a table with what looks wrong.

    Raises:
        TypeError, ValueError, RuntimeError: as in `loss_and_grads`. TypeError or ValueError
            if the function, the inputs or the result of `backward` are not as above.
            RuntimeError if the function is not differentiable, returns two values for the
            same inputs, or can't be evaluated in float64.
    """
    if eps is not None and not (isinstance(eps, Real) and 0 < eps < math.inf):
        raise ValueError(f"eps must be a number above 0, got {eps!r}")
    with torch.inference_mode(False):  # inside it, autograd records nothing
        if callable(x):
            if biases is not None or loss != "sse" or output_activation is not None:
                raise TypeError(
                    "check_gradients(function, inputs, backward) takes no other argument than eps"
                )
            return _check_function(x, target, weights, eps)
        return _check_network(x, target, weights, biases, loss, output_activation, eps)


def _check_network(
    x: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    loss: Loss,
    output_activation: OutputActivation | None,
    eps: float | None,
) -> GradientReport:
    activation = activation_name(output_activation)
    weight_list, bias_list = checked_parameters(x, weights, biases)
    # Called for its argument checks, in the given dtype.
    given_biases = [None if bias is NO_TENSOR else bias for bias in bias_list] or None
    loss_and_grads(
        x, target, weight_list, given_biases, loss=loss, output_activation=output_activation
    )
    # Copies, because autograd may not save a tensor that was made in inference mode.
    x64, target64 = (t.detach().to(torch.float64, copy=True) for t in (x, target))
    inputs, names = {}, [f"weights[{n}]" for n in range(len(weight_list))]
    for layer, name in enumerate(names):
        inputs[name] = weight_list[layer]
        if bias_list and bias_list[layer] is not NO_TENSOR:
            inputs[f"biases[{layer}]"] = bias_list[layer]

    def split(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        given = dict(zip(inputs, tensors, strict=True))
        of_biases = [given.get(f"biases[{n}]", NO_TENSOR) for n in range(len(names))]
        return [given[name] for name in names], of_biases

    def function(*tensors: Tensor) -> Tensor:
        return reference.LOSSES[loss](native(x64, *split(tensors), activation) - target64)

    def backward(*tensors: Tensor) -> list[Tensor | None]:
        of_weights, of_biases = split(tensors)
        present = [None if bias is NO_TENSOR else bias for bias in of_biases]
        grads = loss_and_grads(
            x64, target64, of_weights, present, loss=loss, output_activation=output_activation
        )
        of_layer = zip(grads.weights, grads.biases or (), strict=True)
        return [grad for pair in of_layer for grad in pair if grad is not None]

    widths = "-".join(str(n) for n in [x.shape[-1], *(weight.shape[0] for weight in weight_list)])
    rows = math.prod(x.shape[:-1])
    subject = f"the {loss} loss of a {widths} network over {rows} rows"
    return compared(subject, function, inputs, backward, eps)


def _check_function(
    function: Function, inputs: Inputs, backward: Backward, eps: float | None
) -> GradientReport:
    if not callable(backward):
        raise TypeError(f"backward must be callable, got {type(backward).__name__}")
    named = named_inputs(function, inputs)
    by_name = isinstance(inputs, Mapping)

    def call(callee: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        return callee(**dict(zip(named, tensors, strict=True))) if by_name else callee(*tensors)

    def listed_backward(*tensors: Tensor) -> list[Tensor | None]:
        return listed_gradients(call(backward, tensors), named)

    subject = f"{getattr(function, '__name__', type(function).__name__)}({', '.join(named)})"
    return compared(
        subject,
        lambda *tensors: call(function, tensors),
        named,
        listed_backward,
        eps,
        source=function,
    )
