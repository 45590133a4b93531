"""A derivation against autograd and against differences: `check_gradients`.

Three ways to the same gradient, in double precision: by hand, by autograd, and
numerically, from the function's values a step to either side. The first two must
agree to rounding. The third is wrong in the last third of its digits at best, and
says nothing where the function has a kink within the step; it is there because
it shares no line with the others.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from typing import Any, overload

import torch
from torch import Tensor

from . import checks, reference
from .activations import OutputActivation
from .differences import (
    ROUNDINGS,
    STEP,
    UNIT_ROUNDOFF,
    Differences,
    Function,
    by_differences,
    value_of,
)
from .functional import (
    Loss,
    activation_name,
    checked_parameters,
    loss_and_grads,
    native,
)
from .gradient_report import GradientReport, ParameterReport
from .gradient_rounding import dense, effects_of_inputs, effects_of_operations
from .ops import NO_TENSOR

Backward = Callable[..., Any]
Inputs = Mapping[str, Tensor] | Sequence[Tensor]


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
    """A gradient by hand beside autograd's and a numerical one; the report says if they agree.

    Of this package's network, `loss_and_grads` against autograd of PyTorch's own
    layers::

        print(check_gradients(x, target, weights, biases, loss="sse"))

    Of a derivation of your own, handed in as a function and its backward pass::

        def loss(w, b):
            return ((x @ w.T + b - target) ** 2).sum()

        def backward(w, b):
            delta = 2 * (x @ w.T + b - target)
            return delta.T @ x, delta.sum(0)

        print(check_gradients(loss, [w, b], backward))

    The check runs in float64, whatever comes in: a difference in float32 has two
    digits. The numerical gradient is the central difference

        (f(p + h) - f(p - h)) / 2 h,    h = eps * max(1, |p|)

    and the same with 2 h beside it. From the two and from f(p) it is told how far
    it may be off, and whether the function has a kink there, where it means
    nothing. Of a parameter with more than 4096 elements, so many get one.

    By hand and autograd agree to rounding, however large the function's value is: they
    may be apart by 1e-9 of the element, or by what a few dozen roundings make of it
    where its terms cancel.

    Args:
        x, target, weights, biases, loss, output_activation: as in `loss_and_grads`.
        function: takes the inputs and returns a tensor of one element, made of
            differentiable operations.
        inputs: tensors, in the order of the function's arguments or as a mapping
            by their names. Those of floating point are checked; they reach both
            functions in float64.
        backward: takes the same inputs and returns their gradients in the same
            order or under the same names, None for one that was not derived; not
            for all of them. With one input, the gradient alone will do.
        eps: the step; by default the cube root of float64's precision, 6e-6.

    Returns:
        A `GradientReport`: `.ok`, `.max_error`, `.parameters`, `.worst()`, and
        `print` for a table with what looks wrong.

    Raises:
        TypeError, ValueError, RuntimeError: as in `loss_and_grads`; TypeError or
            ValueError for a function, inputs or a result of `backward` that are not
            as above, RuntimeError for a function that is not differentiable, gives
            two values for the same inputs, or can't be evaluated in float64.
    """
    if eps is not None and not (isinstance(eps, Real) and 0 < eps < math.inf):
        raise ValueError(f"eps must be a number above 0, got {eps!r}")
    with torch.inference_mode(False):  # inside it, autograd records nothing
        if callable(x):
            if biases is not None or loss != "sse" or output_activation is not None:
                raise TypeError("check_gradients(function, inputs, backward) takes only eps beside")
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
    # For its checks, in the dtype that came.
    given_biases = [None if bias is NO_TENSOR else bias for bias in bias_list] or None
    loss_and_grads(
        x, target, weight_list, given_biases, loss=loss, output_activation=output_activation
    )
    # Copies, as autograd may not save a tensor that was made in inference mode.
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
    return _report(subject, function, inputs, backward, eps)


def _check_function(
    function: Function, inputs: Inputs, backward: Backward, eps: float | None
) -> GradientReport:
    if not callable(backward):
        raise TypeError(f"backward must be callable, got {type(backward).__name__}")
    named = _named(function, inputs)
    by_name = isinstance(inputs, Mapping)

    def call(callee: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        return callee(**dict(zip(named, tensors, strict=True))) if by_name else callee(*tensors)

    def listed_backward(*tensors: Tensor) -> list[Tensor | None]:
        return _listed(call(backward, tensors), named)

    subject = f"{getattr(function, '__name__', type(function).__name__)}({', '.join(named)})"
    return _report(subject, lambda *tensors: call(function, tensors), named, listed_backward, eps)


def _named(function: Function, inputs: Inputs) -> dict[str, Tensor]:
    """The inputs by name: their own, else those of the function's arguments."""
    if isinstance(inputs, Mapping):
        named = dict(inputs)
    elif isinstance(inputs, Sequence):
        names = [f"inputs[{n}]" for n in range(len(inputs))]
        with suppress(TypeError, ValueError):  # no signature to be had, or another number
            bound = inspect.signature(function).bind(*inputs).arguments
            if len(bound) == len(inputs):  # no *args
                names = list(bound)
        named = dict(zip(names, inputs, strict=True))
    else:
        raise TypeError(
            f"inputs must be a sequence or mapping of Tensors, got {type(inputs).__name__}"
        )
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"the input {name} must be a Tensor, got {type(tensor).__name__}")
    if not any(tensor.is_floating_point() for tensor in named.values()):
        raise ValueError("inputs must have a tensor of floating point, got none")
    return named


def _listed(grads: Any, inputs: Mapping[str, Tensor]) -> list[Tensor | None]:
    """What a backward function returned, in the order of the inputs.

    Only for an input of floating point, a gradient is held against anything.
    """
    names = list(inputs)
    if grads is None:
        raise ValueError(
            f"backward must return one gradient for each of {', '.join(names)}; got 1, which is "
            "None. Was its return forgotten?"
        )
    if isinstance(grads, Tensor):
        grads = [grads]
    if isinstance(grads, Mapping):
        unknown = [name for name in grads if name not in names]
        if unknown:
            raise ValueError(f"backward must return gradients of {', '.join(names)}; got {unknown}")
        grads = [grads.get(name) for name in names]
    if not isinstance(grads, Sequence):
        raise TypeError(
            f"backward must return a sequence or mapping of Tensors, got {type(grads).__name__}"
        )
    if len(grads) != len(names):
        raise ValueError(
            f"backward must return one gradient for each of {', '.join(names)}; got {len(grads)}"
        )
    for name, grad in zip(names, grads, strict=True):
        if not (grad is None or isinstance(grad, Tensor)):
            raise TypeError(
                f"backward's gradient of {name} must be a Tensor, got {type(grad).__name__}"
            )
        if grad is not None and grad.is_complex():
            raise TypeError(
                f"backward's gradient of {name} must be real, got {checks.name_of(grad.dtype)}"
            )
        if grad is not None and inputs[name].is_complex():
            raise TypeError(
                f"the input {name} must be real to be checked, got "
                f"{checks.name_of(inputs[name].dtype)}; return None for its gradient"
            )
    checked = [name for name in names if inputs[name].is_floating_point()]
    if all(grads[names.index(name)] is None for name in checked):
        raise ValueError(
            f"backward must return a gradient of {' or '.join(checked)} to be checked; got none"
        )
    return list(grads)


def _report(
    subject: str,
    function: Function,
    inputs: Mapping[str, Tensor],
    backward: Callable[..., list[Tensor | None]],
    eps: float | None,
) -> GradientReport:
    """The check itself, of a function and a backward that take all inputs in their order."""
    eps = STEP if eps is None else float(eps)
    tensors = {
        name: tensor.detach().double() if tensor.is_floating_point() else tensor.detach()
        for name, tensor in inputs.items()
    }
    checked = [name for name, tensor in inputs.items() if tensor.is_floating_point()]
    try:
        loss, autograd = _by_autograd(function, tensors, checked)
        # Copies, as a function may change what it is given.
        with torch.no_grad():
            by_hand = backward(*(tensor.clone() for tensor in tensors.values()))
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        raise RuntimeError(
            "function and backward are called in float64. Pass every tensor that they use as an "
            f"input, or make those float64 that they take from elsewhere: {error}"
        ) from error
    given = dict(zip(tensors, by_hand, strict=True))
    gradients = dict(zip(checked, autograd, strict=True))
    # What rounding every input makes of the loss, in units of the rounding.
    spread = sum(_largest((grad * tensors[name]).abs().sum()) for name, grad in gradients.items())
    differences = {
        name: by_differences(function, tensors, name, loss, spread, eps) for name in checked
    }
    tolerances = _tolerances(function, tensors, gradients, differences)
    parameters = []
    for name, grad in gradients.items():
        hand, found = given[name], differences[name]
        parameters.append(
            ParameterReport(
                name,
                None if hand is None else dense(hand.detach()).double(),
                grad,
                found.numerical,
                found.uncertainty,
                found.is_at_kink,
                tolerances[name],
            )
        )
    return GradientReport(subject, _notes(inputs, eps), loss, eps, tuple(parameters))


def _tolerances(
    function: Function,
    tensors: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    differences: Mapping[str, Differences],
) -> dict[str, float]:
    """How far by hand and autograd may be apart by rounding, for each input.

    Not by how large the loss is, of which a part may be constant, but by how much the
    gradient moves where what it is computed from does; see gradient_rounding.py.
    """
    names = list(gradients)
    by_operations = effects_of_operations(function, tensors, names, list(gradients.values()))
    by_inputs = effects_of_inputs(function, tensors, names)
    if by_inputs is None:
        # The differences know the diagonal, and near a minimum |f_ij|^2 <= f_ii f_jj.
        sizes = {name: tensors[name].abs().clamp(min=1) for name in names}
        curvatures = {name: differences[name].curvature for name in names}
        total = sum(_largest((curvatures[n] * sizes[n] ** 2).sum()) for n in names)
        by_inputs = [(curvatures[n] * total).sqrt() for n in names]
    return {
        name: ROUNDINGS * UNIT_ROUNDOFF * sum(map(_largest, (gradients[name], *effects)))
        for name, *effects in zip(names, by_operations, by_inputs, strict=True)
    }


def _largest(tensor: Tensor) -> float:
    """The largest finite absolute value, or 0."""
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _notes(inputs: Mapping[str, Tensor], eps: float) -> tuple[str, ...]:
    dtypes = {t.dtype for t in inputs.values() if t.is_floating_point()} - {torch.float64}
    notes = []
    if dtypes:
        came = " and ".join(sorted(checks.name_of(dtype) for dtype in dtypes))
        notes.append(f"The {came} input is checked in float64.")
    notes.append(f"Numerical: central differences with the step {eps:.2g} * max(1, |element|).")
    return tuple(notes)


def _by_autograd(
    function: Function, tensors: Mapping[str, Tensor], checked: Sequence[str]
) -> tuple[float, list[Tensor]]:
    """The loss and its gradients at the inputs that are checked."""
    leaves = {
        name: tensor.clone().requires_grad_(name in checked) for name, tensor in tensors.items()
    }
    with torch.enable_grad():
        # Not the leaves themselves, which nobody may change in place.
        loss = function(*(leaf.clone() for leaf in leaves.values()))
        _check_loss(loss)
        grads = torch.autograd.grad(
            loss.sum(), [leaves[name] for name in checked], allow_unused=True
        )
    again = value_of(function, tensors)
    if again != loss.item() and not (again != again and loss.isnan().item()):
        raise RuntimeError(
            "the function must return the same value for the same inputs, got "
            f"{loss.item()!r} and then {again!r}. Seed what is random inside it."
        )
    return loss.item(), [
        torch.zeros_like(leaves[name]) if grad is None else dense(grad.detach())
        for name, grad in zip(checked, grads, strict=True)
    ]


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"the function must return a Tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise RuntimeError(
            f"the function must return a tensor of one element, got shape {tuple(loss.shape)}. "
            "Reduce it: (grad_output * y).sum() has the gradient of y for grad_output."
        )
    if loss.dtype != torch.float64:
        raise RuntimeError(
            "the function must compute in float64, as its inputs are, "
            f"got {checks.name_of(loss.dtype)}"
        )
    if not loss.requires_grad:
        raise RuntimeError(
            "the function must be made of differentiable operations: what it returned does not "
            "depend on its inputs, as far as autograd knows"
        )
