"""`check_gradients`: a derivation compared with autograd and with central differences.

The same gradient is computed in three ways, in double precision: by hand, by autograd, and
numerically, from the function's values at a step to either side. The first two must agree to
rounding. The third loses a third of its digits or more, and means nothing if the function has
a kink within the step. It is there because it shares no code with the others.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from . import modes as modes_of
from .arguments import Backward, Inputs, listed_gradients, named_inputs, pair_of_lists
from .arrays import any_array, backward_of_arrays, function_of_arrays
from .comparison import compared, in_float64
from .differences import Function
from .modes import by_gradcheck, first_line
from .operators import name_of, subject_of
from .relations import Closeness
from .report import GradientReport
from .wording import names_in


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
    backward: Backward | None = None,
) -> GradientReport: ...


@overload
def check_gradients(
    function: Any,
    inputs: Inputs,
    backward: Backward | None = None,
    /,
    *,
    eps: float | None = None,
    second_derivative: bool = False,
    forward_mode: bool = False,
    vmap: bool = False,
) -> GradientReport: ...


def check_gradients(
    x: Any,
    target: Any,
    weights: Any = None,
    biases: Any = None,
    *,
    loss: Loss = "sse",
    output_activation: OutputActivation | None = None,
    eps: float | None = None,
    backward: Backward | None = None,
    second_derivative: bool = False,
    forward_mode: bool = False,
    vmap: bool = False,
) -> GradientReport:
    """Compares a gradient derived by hand with autograd's and with a numerical one.

    For a derivation of your own, pass a function and its backward pass::

        def loss(w, b):
            return ((x @ w.T + b - target) ** 2).sum()

        def backward(w, b):
            delta = 2 * (x @ w.T + b - target)
            return delta.T @ x, delta.sum(0)

        print(check_gradients(loss, [w, b], backward))

    Where the gradient is wrong, the report says what was done wrong, if making that mistake in
    the right backward pass gives this gradient, to rounding. The functions may be written in
    NumPy: where the inputs are arrays, they are called with arrays.

    For a function that brings its derivative along (an `autograd.Function`, an operator of
    `torch.library`, a module), hand it over with its inputs, in a test of one line::

        assert check_gradients(MyFunction, [x, w]).ok

    It may return any number of tensors. Its derivative is compared with that of the operations
    in its forward pass, if these are PyTorch's, and with the numerical one. What
    `torch.autograd.gradcheck` objects to is among the findings; beyond it the report says which
    input is wrong, in which element, and by which factor.

    For this package's network, it compares `loss_and_grads` with autograd of PyTorch's own
    layers::

        print(check_gradients(x, target, weights, biases, loss="sse"))

    or a derivation of yours of that network, `backward=mine` with
    ``mine(x, target, weights, biases)`` that returns the gradients of the weights and those of
    the biases, as two lists.

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
            differentiable operations; without a backward pass, tensors of any shape.
        inputs: tensors or NumPy arrays, in the order of the function's arguments or as a
            mapping by their names. Floating-point inputs are checked; both functions get them
            in float64. Of a module, the parameters are checked as well.
        backward: takes the same inputs and returns their gradients in the same order or
            under the same names. None stands for a gradient that was not derived; one must
            be there. With one input, it may return the gradient alone.
        eps: the step; by default the cube root of float64's precision, 6e-6.
        second_derivative, forward_mode, vmap: without a backward pass, what else is checked:
            the derivative of the derivative; each derivative by a tangent; outputs and
            gradients of a batch by `torch.func.vmap`.

    Returns:
        A `GradientReport`: `.ok`, `.max_error`, `.parameters`, `.findings()`, `.worst()`, and
        `print` for a table with what looks wrong.

    Raises:
        TypeError, ValueError, RuntimeError: as in `loss_and_grads`. TypeError or ValueError
            if the function, the inputs or the result of `backward` are not as above.
            RuntimeError if the function is not differentiable, returns two values for the
            same inputs, or can't be evaluated in float64.
    """
    if eps is not None and not (isinstance(eps, Real) and 0 < eps < math.inf):
        raise ValueError(f"eps must be a number above 0, got {eps!r}")
    modes = {"second_derivative": second_derivative, "forward_mode": forward_mode, "vmap": vmap}
    asked = [name for name, is_asked in modes.items() if is_asked]
    with torch.inference_mode(False):  # inside it, autograd records nothing
        if callable(x):
            of_network = biases is not None or loss != "sse" or output_activation is not None
            if of_network or backward is not None:
                raise TypeError(
                    "check_gradients(function, inputs, backward) takes no other argument than eps"
                )
            if weights is None:
                return _check_derivative(x, target, eps, asked)
            if asked:
                raise TypeError(f"{asked[0]} is for a function without a backward pass")
            return _check_function(x, target, weights, eps)
        if asked:
            raise TypeError(f"{asked[0]} is for a function without a backward pass")
        return _check_network(x, target, weights, biases, loss, output_activation, eps, backward)


def _check_network(
    x: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    loss: Loss,
    output_activation: OutputActivation | None,
    eps: float | None,
    by_hand: Backward | None,
) -> GradientReport:
    activation = activation_name(output_activation)
    weight_list, bias_list = checked_parameters(x, weights, biases)
    # Called for its argument checks, in the given dtype.
    given_biases = [None if bias is NO_TENSOR else bias for bias in bias_list] or None
    loss_and_grads(
        x, target, weight_list, given_biases, loss=loss, output_activation=output_activation
    )
    # Copies, because autograd may not save a tensor that was made in inference mode.
    x64 = x.detach().to(torch.float64, copy=True)
    is_of_values = loss != "cross_entropy" or target.is_floating_point()
    target64 = target.detach().to(torch.float64 if is_of_values else torch.int64, copy=True)
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
        return reference.LOSSES[loss](native(x64, *split(tensors), activation), target64)

    def backward(*tensors: Tensor) -> list[Tensor | None]:
        of_weights, of_biases = split(tensors)
        present = [None if bias is NO_TENSOR else bias for bias in of_biases]
        if by_hand is not None:
            pair = pair_of_lists(by_hand(x64, target64, of_weights, present), len(names))
        else:
            grads = loss_and_grads(
                x64, target64, of_weights, present, loss=loss, output_activation=output_activation
            )
            pair = list(grads.weights), list(grads.biases or ())
        found = dict(zip(names, pair[0], strict=True))
        found |= {f"biases[{n}]": grad for n, grad in enumerate(pair[1])}
        return listed_gradients({name: found.get(name) for name in inputs}, inputs)

    widths = "-".join(str(n) for n in [x.shape[-1], *(weight.shape[0] for weight in weight_list)])
    rows = math.prod(x.shape[:-1])
    subject = f"the {loss} loss of a {widths} network over {rows} rows"
    return compared(
        subject, function, inputs, backward, eps, {id(x64): "x", id(target64): "target"}
    )


def _check_function(
    function: Function, inputs: Inputs, backward: Backward, eps: float | None
) -> GradientReport:
    if not callable(backward):
        raise TypeError(f"backward must be callable, got {type(backward).__name__}")
    named = named_inputs(function, inputs)
    by_name = isinstance(inputs, Mapping)
    called, called_back = function, backward
    if any_array(inputs):
        called, called_back = function_of_arrays(function), backward_of_arrays(backward)

    def call(callee: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        return callee(**dict(zip(named, tensors, strict=True))) if by_name else callee(*tensors)

    def listed_backward(*tensors: Tensor) -> list[Tensor | None]:
        return listed_gradients(call(called_back, tensors), named)

    return compared(
        f"{name_of(function)}({', '.join(named)})",
        lambda *tensors: call(called, tensors),
        named,
        listed_backward,
        eps,
        names_in(function),
    )


def _check_derivative(
    handed_over: Any, inputs: Inputs, eps: float | None, modes: Sequence[str]
) -> GradientReport:
    """The check of a function that brings its derivative along."""
    subject = subject_of(handed_over, inputs)
    named = named_inputs(subject.function, subject.inputs)
    words = f"{subject.name}({', '.join(named)})"
    report = compared(words, subject.function, named, None, eps, names_in(handed_over))
    tensors = in_float64(named)
    checked = [parameter.name for parameter in report.parameters]
    right = {p.name: p.autograd for p in report.parameters}
    is_close = Closeness(sum(p.tolerance for p in report.parameters))
    problems: list[str] = []
    second = None
    with warnings.catch_warnings():  # of torch.jit, which PyTorch's own forward mode imports
        warnings.simplefilter("ignore", DeprecationWarning)
        objection = by_gradcheck(subject, tensors, checked)
        if objection:
            problems.append(f"torch.autograd.gradcheck objects: {objection}")
        if "forward_mode" in modes:
            problems += modes_of.forward_mode(subject, tensors, right, is_close)
        if "vmap" in modes:
            problems += modes_of.under_vmap(subject, tensors, checked, is_close)
        if "second_derivative" in modes:
            try:
                derived, all_inputs = modes_of.first_derivative(subject, tensors, checked)
                second = compared(f"the gradient of {words}", derived, all_inputs, None, eps)
            except RuntimeError as error:
                problems.append(f"the second derivative can't be computed: {first_line(error)}")
    return replace(report, problems=tuple(problems), second=second)
