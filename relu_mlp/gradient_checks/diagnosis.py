"""What a wrong gradient looks like, which helps to find the mistake."""

from __future__ import annotations

import torch
from torch import Tensor

#: |by hand - autograd| may be this fraction of the element, in addition to the tolerance of the
#: parameter. Rounding makes some 1e-13 of the element, and a wrong term far more than 1e-9.
OF_ELEMENT = 2.0**-30


def ulp(tensor: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The distance between neighboring numbers of a dtype at |tensor|, as a float64 tensor."""
    info = torch.finfo(dtype)
    magnitude = tensor.double().abs().nan_to_num(posinf=info.max).clamp(min=info.smallest_normal)
    return info.eps * torch.exp2(torch.frexp(magnitude).exponent.double() - 1)


def allowed(gradient: Tensor, tolerance: float) -> Tensor:
    """How far another computation may be from each element of a gradient."""
    return tolerance + OF_ELEMENT * gradient.abs().nan_to_num(0, 0, 0)


def diagnosis(by_hand: Tensor, autograd: Tensor, tolerance: float) -> str:
    """What is wrong with a gradient, compared with the right one."""

    def is_close(left: Tensor, right: Tensor) -> bool:
        return left.shape == right.shape and bool(
            ((left - right).abs() <= allowed(right, tolerance)).all()
        )

    if by_hand.shape != autograd.shape:
        shapes = f"it has shape {tuple(by_hand.shape)} instead of {tuple(autograd.shape)}"
        if autograd.dim() == 2 and is_close(by_hand, autograd.T):
            return f"{shapes}; it is the transpose"
        if by_hand.numel() == 1 and is_close(by_hand.reshape(()), autograd.sum()):
            return f"{shapes}; it is the sum over all elements of the gradient"
        return shapes
    if not by_hand.isfinite().all() and autograd.isfinite().all():
        return "it is not finite"
    if is_close(by_hand, torch.zeros_like(by_hand)):
        return "it is 0"
    if autograd.dim() == 2 and is_close(by_hand, autograd.T):
        return "it is the transpose"
    if autograd.numel() > 1 and is_close(by_hand, autograd.sum().expand_as(by_hand)):
        return "every element is the sum over all elements of the gradient"
    # Tested before a common factor: in a single element, every error is a factor.
    error = (by_hand - autograd).abs()
    if error.max() < 2.0**-16 * autograd.abs().max():
        return "it is right to some digits only, as if computed in single precision"
    factor = float((by_hand * autograd).sum() / autograd.square().sum())
    if is_close(by_hand, factor * autograd):
        return f"it is {in_words(factor)} autograd's"
    return where_it_is_wrong(error > allowed(autograd, tolerance))


def in_words(factor: float) -> str:
    """A factor between two gradients, if possible as a simple fraction."""
    if abs(factor + 1) < 1e-6:
        return "minus"
    if abs(factor - round(factor)) < 1e-6 * abs(factor):
        return f"{round(factor)} times"
    if abs(1 / factor - round(1 / factor)) < 1e-6 / abs(factor):
        return f"{'-' if factor < 0 else ''}1/{abs(round(1 / factor))} of"
    return f"{factor:.6g} times"


def where_it_is_wrong(is_wrong: Tensor) -> str:
    """How many elements are wrong, and in which rows or columns, unless these are all."""
    said = f"{int(is_wrong.sum())} of {is_wrong.numel()} elements are wrong"
    if is_wrong.dim() == 1:
        return f"{said}{_named('index', 'indices', is_wrong)}"
    if is_wrong.dim() == 2:
        rows, columns = is_wrong.any(1), is_wrong.any(0)
        said += _named("row", "rows", rows) + _named("column", "columns", columns)
    return said


def _named(singular: str, plural: str, is_wrong: Tensor) -> str:
    places = is_wrong.nonzero().flatten().tolist()
    if len(places) == len(is_wrong):
        return ""
    shown = ", ".join(map(str, places[:5])) + (", ..." if len(places) > 5 else "")
    return f", all in {singular if len(places) == 1 else plural} {shown}"
