"""The comparison of three gradients, and how far two of them may differ by rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import checks
from .differences import (
    ROUNDINGS,
    STEP,
    UNIT_ROUNDOFF,
    CentralDifferences,
    Function,
    central_differences,
    value_of,
)
from .report import GradientReport, ParameterReport
from .rounding import allowed
from .search import diagnose
from .sensitivity import dense, input_sensitivity, leaves_and_loss, operand_sensitivity
from .tape import Backward, record
from .wording import Sentences


def compared(
    subject: str,
    function: Function,
    inputs: Mapping[str, Tensor],
    backward: Callable[..., list[Tensor | None]] | None,
    eps: float | None,
    names: Mapping[int, str] | None = None,
) -> GradientReport:
    """Computes and compares the gradients of a function.

    Args:
        subject: what is checked, for the report.
        function, backward: take all inputs, in their order. Without a backward pass, the
            derivative that the function brings along takes its place, and is compared with
            that of the operations in its forward pass.
        eps: the relative step of the differences; None for the default.
        names: what the user calls tensors that are no inputs, by their id.
    """
    eps = STEP if eps is None else float(eps)
    tensors = in_float64(inputs)
    checked = [name for name, tensor in inputs.items() if tensor.is_floating_point()]
    try:
        loss, autograd = _by_autograd(function, tensors, checked)
        # Copies, because a function may change its arguments.
        if backward is None:
            by_hand: Sequence[Tensor | None] = ()
        else:
            with torch.no_grad():
                by_hand = backward(*(tensor.clone() for tensor in tensors.values()))
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        raise RuntimeError(
            "function and backward are called in float64. Pass every tensor that they use as an "
            f"input, or convert the others to float64: {error}"
        ) from error
    gradients = dict(zip(checked, autograd, strict=True))
    # How far rounding every input moves the loss, in units of the rounding.
    spread = sum(_largest((grad * tensors[name]).abs().sum()) for name, grad in gradients.items())
    differences = {
        name: central_differences(function, tensors, name, loss, spread, eps) for name in checked
    }
    tolerances = _tolerances(function, tensors, gradients, differences)
    notes = list(_notes(inputs, eps))
    if backward is None:
        hands = dict(gradients)
        of_forward = _by_operations(function, tensors, gradients, differences, tolerances)
        notes.append(BY_OPERATIONS if of_forward is not None else BY_ITSELF)
        gradients = of_forward or gradients
    else:
        hands = {
            name: dense(hand.detach()).double()
            for name, hand in zip(tensors, by_hand, strict=True)
            if name in gradients and hand is not None
        }
    reports = {
        name: ParameterReport(
            name,
            hands.get(name),
            grad,
            differences[name].numerical,
            differences[name].uncertainty,
            differences[name].is_at_kink,
            tolerances[name],
        )
        for name, grad in gradients.items()
    }
    wrong = [name for name, report in reports.items() if report.is_wrong_by_hand]
    if wrong:
        diagnoses, tape = diagnose(function, tensors, hands, gradients, tolerances, wrong)
        say = Sentences(tape, names or {}, diagnoses)
        for name in wrong:
            said = say(name, hands[name], gradients[name], tolerances[name])
            reports[name] = replace(reports[name], mistake=said)
    return GradientReport(subject, tuple(notes), loss, eps, tuple(reports.values()))


#: Notes on what was compared where a function brings its derivative along.
BY_OPERATIONS = (
    "By hand: the derivative that it brings along. Autograd: that of the operations in its forward "
    "pass."
)
BY_ITSELF = (
    "By hand and autograd are both the derivative that it brings along, for its forward pass is "
    "one operation: the numerical gradient decides."
)


def in_float64(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().double() if tensor.is_floating_point() else tensor.detach()
        for name, tensor in inputs.items()
    }


def _by_operations(
    function: Function,
    tensors: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    differences: Mapping[str, CentralDifferences],
    tolerances: Mapping[str, float],
) -> dict[str, Tensor] | None:
    """The gradients of the operations in a forward pass, whatever derivative the function brings
    along; None if it can't be looked into."""
    tape = record(function, tensors, list(gradients))
    if tape is None or not all(step.is_of_pytorch for step in tape.steps):
        return None
    try:
        backward = Backward(tape)
    except RuntimeError:
        return None
    found = {name: backward.gradient(value) for name, value in tape.inputs.items()}
    for name, gradient in found.items():
        difference = differences[name]
        gap = (difference.numerical - gradient).abs()
        bound = difference.uncertainty + allowed(gradient, tolerances[name])
        if ((gap > bound) & ~difference.is_at_kink).any():
            return None  # the tape missed something
    return found


def _tolerances(
    function: Function,
    tensors: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    differences: Mapping[str, CentralDifferences],
) -> dict[str, float]:
    """How far by hand and autograd may differ by rounding, for each input.

    The size of the loss says nothing about it, because a part of the loss may be constant.
    What counts is how far the gradient moves when the numbers that it is computed from do;
    see sensitivity.py.
    """
    names = list(gradients)
    by_operands = operand_sensitivity(function, tensors, names, list(gradients.values()))
    by_inputs = input_sensitivity(function, tensors, names)
    if by_inputs is None:
        # The differences give the diagonal, and near a minimum |f_ij|^2 <= f_ii f_jj.
        sizes = {name: tensors[name].abs().clamp(min=1) for name in names}
        curvatures = {name: differences[name].curvature for name in names}
        total = sum(_largest((curvatures[n] * sizes[n] ** 2).sum()) for n in names)
        by_inputs = [(curvatures[n] * total).sqrt() for n in names]
    return {
        name: ROUNDINGS * UNIT_ROUNDOFF * sum(map(_largest, (gradients[name], *effects)))
        for name, *effects in zip(names, by_operands, by_inputs, strict=True)
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
    with torch.enable_grad():
        leaves, loss = leaves_and_loss(function, tensors, checked)
        _check_loss(loss)
        grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    again = value_of(function, tensors)
    if again != loss.item() and not (again != again and loss.isnan().item()):
        raise RuntimeError(
            "the function must return the same value for the same inputs, got "
            f"{loss.item()!r} and then {again!r}. Seed what is random inside it."
        )
    return loss.item(), [
        torch.zeros_like(leaf) if grad is None else dense(grad.detach())
        for leaf, grad in zip(leaves, grads, strict=True)
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
            "the function must be made of differentiable operations: as far as autograd knows, "
            "what it returned does not depend on its inputs"
        )
