"""What else a derivative must do, on request: be derived itself, go forward, and under vmap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from .differences import Function
from .operators import Subject, arriving, weighted_sum
from .relations import Closeness, factor_between
from .wording import in_words

#: Of a larger input, so many elements get a tangent of their own.
MAX_TANGENTS = 256
#: How many copies of the inputs vmap gets.
BATCH = 3


def first_derivative(
    subject: Subject, tensors: Mapping[str, Tensor], checked: Sequence[str]
) -> tuple[Function, dict[str, Tensor]]:
    """The gradients of a function, each times other numbers, summed: a function to be derived, by
    the inputs and by the gradients that arrive at the outputs. Returns it with its inputs."""
    with torch.no_grad():
        weights = arriving(subject.outputs(*(tensor.clone() for tensor in tensors.values())))
    names = (
        ["grad_output"]
        if len(weights) == 1
        else [f"grad_outputs[{n}]" for n, _ in enumerate(weights)]
    )
    inputs = {**tensors, **dict(zip(names, weights, strict=True))}
    places = [n for n, name in enumerate(tensors) if name in checked]

    def derived(*given: Tensor) -> Tensor:
        with torch.enable_grad():
            leaves = [
                each if each.requires_grad else each.detach().requires_grad_(n in places)
                for n, each in enumerate(given)
            ]
            of = [leaves[n] for n in places]
            outputs = subject.outputs(*leaves[: len(tensors)])
            grads = torch.autograd.grad(
                outputs, of, leaves[len(tensors) :], create_graph=True, allow_unused=True
            )
            # A gradient without a graph is constant, or pretends to be: the differences tell.
            found = [
                grad if grad is not None and grad.requires_grad else _constant(grad, leaf)
                for grad, leaf in zip(grads, of, strict=True)
            ]
            return weighted_sum(found)

    return derived, inputs


def _constant(gradient: Tensor | None, leaf: Tensor) -> Tensor:
    """A gradient that has no graph, with one that says that its derivative is 0."""
    zero = 0 * leaf.sum()
    return torch.zeros_like(leaf) + zero if gradient is None else gradient + zero


def forward_mode(
    subject: Subject, tensors: dict[str, Tensor], right: dict[str, Tensor], closeness: Closeness
) -> Iterator[str]:
    """What is wrong with the derivatives in forward mode, element by element."""
    for name, gradient in right.items():
        try:
            found = _by_tangents(subject, tensors, name)
        except (RuntimeError, NotImplementedError) as error:
            yield f"forward mode can't be computed: {first_line(error)}"
            return
        if found is None:
            yield f"forward mode drops the tangent of {name}: the outputs come without one"
            continue
        gradient = gradient.flatten()[: len(found)]
        if not closeness(found, gradient):
            yield f"forward mode is wrong for {name}: {compared_with(found, gradient, closeness)}"


def _by_tangents(subject: Subject, tensors: dict[str, Tensor], name: str) -> Tensor | None:
    """The gradient of one input by a tangent for each element; None without tangents."""
    chosen = tensors[name]
    found = []
    for position in range(min(chosen.numel(), MAX_TANGENTS)):
        tangent = torch.zeros_like(chosen)
        tangent.view(-1)[position] = 1
        with torch.no_grad(), forward_ad.dual_level():
            arguments = {key: tensor.clone() for key, tensor in tensors.items()}
            arguments[name] = forward_ad.make_dual(chosen.clone(), tangent)
            value = subject.function(*arguments.values())
            made = forward_ad.unpack_dual(value).tangent
            if made is None:
                return None
            found.append(made.detach().sum())
    return torch.stack(found) if found else chosen.flatten()


def under_vmap(
    subject: Subject, tensors: dict[str, Tensor], checked: Sequence[str], closeness: Closeness
) -> Iterator[str]:
    """What is wrong under vmap, of the outputs and of the gradients."""
    batch = {
        name: torch.stack([tensor * (1 + n / 8) for n in range(BATCH)])
        if name in checked
        else torch.stack([tensor] * BATCH)
        for name, tensor in tensors.items()
    }
    alone = [{name: many[n] for name, many in batch.items()} for n in range(BATCH)]

    def gradients(*given: Tensor) -> tuple[Tensor, ...]:
        places = tuple(n for n, name in enumerate(tensors) if name in checked)
        of_all = torch.func.grad(lambda *each: subject.function(*each).sum(), argnums=places)
        return tuple(of_all(*given))

    def outputs(*given: Tensor) -> tuple[Tensor, ...]:
        return tuple(subject.outputs(*given))

    for what, function in (("the outputs are", outputs), ("the gradients are", gradients)):
        try:
            together = torch.func.vmap(function)(*(many.clone() for many in batch.values()))
        except (RuntimeError, NotImplementedError, ValueError) as error:
            yield f"under vmap {what} not to be had: {first_line(error)}"
            continue
        separate = [function(*(each.clone() for each in one.values())) for one in alone]
        for place, many in enumerate(together):
            single = torch.stack([one[place].detach() for one in separate])
            if not closeness(many.detach(), single):
                yield f"under vmap {what} wrong: {compared_with(many, single, closeness)}"


def compared_with(found: Tensor, right: Tensor, closeness: Closeness) -> str:
    """In what one result differs from another."""
    if found.shape != right.shape:
        return f"shape {tuple(found.shape)} instead of {tuple(right.shape)}"
    factor = factor_between(found, right, closeness)
    if factor is not None:
        return f"it is {in_words(factor)} what it should be"
    error = (found - right).abs().flatten()
    at = int(error.argmax())
    return (
        f"element {at} is {found.flatten()[at].item():.8g} instead of "
        f"{right.flatten()[at].item():.8g}"
    )


def by_gradcheck(subject: Subject, tensors: dict[str, Tensor], checked: Sequence[str]) -> str:
    """What torch.autograd.gradcheck objects to, but for numbers: those are compared more closely
    here. "" if it has nothing to object to."""
    arguments = tuple(
        tensor.clone().requires_grad_(name in checked) for name, tensor in tensors.items()
    )
    try:
        torch.autograd.gradcheck(
            lambda *given: tuple(subject.outputs(*given)),
            arguments,
            fast_mode=True,
            nondet_tol=1e-9,
        )
    except (RuntimeError, ValueError) as error:
        said = first_line(error)
        is_of_numbers = "Jacobian mismatch" in said or "expected to be zero" in said
        return "" if is_of_numbers else said
    return ""


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
