"""The output activations: the one table of what there is.

To add one, add its row to `ROWS` and its name to `OutputActivation`, and see csrc/activation.h
for the library. All else derives from the row. The import fails if the two lists differ, or if
the library's table (csrc/activation.h) has other names. docs/adding.md has the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from .checks import listed

#: What `relu_mlp(..., output_activation=...)` takes, besides None.
OutputActivation = Literal["relu", "sigmoid", "tanh"]


class Row(NamedTuple):
    """An output activation, y = phi(z), with its derivatives in terms of y."""

    name: str  #: what people and the operators call it
    phi: Callable[[Tensor], Tensor]  #: z -> y
    #: (gradient at y, y) -> gradient at z. PyTorch's own operators for grad * (1 - y) * y and
    #: grad * (1 - y * y) round a bfloat16 once, not three times.
    backward: Callable[[Tensor, Tensor], Tensor]
    #: y -> the derivative of phi' by y; None where phi' is piecewise constant
    curvature: Callable[[Tensor], Tensor] | None
    module: type[nn.Module]  #: the child that stands for it; it may have its defaults only
    function: str  #: what that child calls, as a path below `torch`
    steepest: tuple[float, float]  #: the largest |phi'|, and the largest |curvature|


def select(change: Tensor, a: Tensor) -> Tensor:
    """What a ReLU passes on of a change: all where a > 0 or is NaN, and 0 elsewhere.

    ``change.masked_fill(a <= 0, 0)`` in one pass over memory.
    """
    return torch.ops.aten.threshold_backward(change, a, 0)


ROWS = (
    Row(
        name="relu",
        phi=torch.relu,
        backward=lambda grad, y: select(grad, y),
        curvature=None,
        module=nn.ReLU,
        function="relu",
        steepest=(1.0, 0.0),
    ),
    Row(
        name="sigmoid",
        phi=torch.sigmoid,
        backward=lambda grad, y: torch.ops.aten.sigmoid_backward(grad, y),
        curvature=lambda y: 1 - 2 * y,
        module=nn.Sigmoid,
        function="sigmoid",
        steepest=(0.25, 1.0),
    ),
    Row(
        name="tanh",
        phi=torch.tanh,
        backward=lambda grad, y: torch.ops.aten.tanh_backward(grad, y),
        curvature=lambda y: -2 * y,
        module=nn.Tanh,
        function="tanh",
        steepest=(1.0, 2.0),
    ),
)

if get_args(OutputActivation) != tuple(row.name for row in ROWS):
    raise ImportError("OutputActivation and ROWS must have the same names in the same order")


# -- What derives from the table. The operators call the identity "none". ----------------------

#: phi, by the operators' name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    **{row.name: row.phi for row in ROWS},
}

#: (gradient at y, y) -> gradient at z, by the operators' name. "none" needs no y.
ACTIVATION_BACKWARDS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "none": lambda grad, y: grad,
    **{row.name: row.backward for row in ROWS},
}

#: y -> the derivative of phi' by y, where phi' is not piecewise constant.
CURVATURES = {row.name: row.curvature for row in ROWS if row.curvature is not None}

#: The operators' names of the output activations.
ACTIVATION_NAMES: dict[str | None, str] = {None: "none", **{row.name: row.name for row in ROWS}}

#: The modules that may follow the last Linear, and the activation each stands for.
OUTPUT_ACTIVATIONS: dict[type[nn.Module], OutputActivation] = {
    row.module: name for row, name in zip(ROWS, get_args(OutputActivation), strict=True)
}

#: What those modules call, as paths below `torch`.
FUNCTIONS = {row.name: row.function for row in ROWS}

#: The attributes that such a module has when it is made without arguments, where there are any.
#: With another value, nn.Softplus(beta=2) say, it is another function.
DEFAULTS = {
    row.module: defaults
    for row in ROWS
    if row.module is not nn.ReLU  # `inplace` does not matter to a fused network
    and (
        defaults := {
            name: value
            for name, value in vars(row.module()).items()
            if name not in vars(nn.Module())
        }
    )
}

#: For messages: "None, 'relu', 'sigmoid' or 'tanh'".
CHOICES = f"None, {listed(row.name for row in ROWS)}"
