"""Units in the last place, and how far two computations of a gradient may differ by rounding."""

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
