"""The table of output activations.

To add one, add a row to `ROWS`, its name to `OutputActivation`, and a row to csrc/activation.h for
the library. Everything else derives from these rows. The import fails if `ROWS` and
`OutputActivation` differ, or if the library's table has other names. docs/adding.md has the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from .checks import listed

#: The values of `relu_mlp(..., output_activation=...)` besides None.
OutputActivation = Literal["relu", "sigmoid", "tanh"]


class Row(NamedTuple):
    """An output activation, y = phi(z), with its derivatives in terms of y."""

    name: str  #: its name in the public functions and in the operators
    phi: Callable[[Tensor], Tensor]  #: z -> y
    #: (gradient at y, y) -> gradient at z. PyTorch's own operators for grad * (1 - y) * y and
    #: grad * (1 - y * y) round a bfloat16 once, not three times.
    backward: Callable[[Tensor, Tensor], Tensor]
    #: y -> d phi' / d y, with phi' as a function of y; None where phi' is piecewise constant
    curvature: Callable[[Tensor], Tensor] | None
    module: type[nn.Module]  #: the module that computes it when made without arguments
    function: str  #: the function that this module calls, as a path below `torch`
    steepest: tuple[float, float]  #: the largest |phi'|, and the largest |curvature|


def select(change: Tensor, a: Tensor) -> Tensor:
    """The derivative of ReLU applied to a change: `change` where a > 0 or is NaN, 0 elsewhere.

    Equal to ``change.masked_fill(a <= 0, 0)``, in one pass over memory.

    Args:
        change: a gradient at a, or a tangent of its pre-activation.
        a: the activation, of the same shape.
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


# -- Derived from the table. The operators call the identity "none". ---------------------------

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

#: y -> d phi' / d y, where phi' is not piecewise constant.
CURVATURES = {row.name: row.curvature for row in ROWS if row.curvature is not None}

#: The operators' names of the output activations.
ACTIVATION_NAMES: dict[str | None, str] = {None: "none", **{row.name: row.name for row in ROWS}}

#: The modules that may follow the last Linear, and the activation that each computes.
OUTPUT_ACTIVATIONS: dict[type[nn.Module], OutputActivation] = {
    row.module: name for row, name in zip(ROWS, get_args(OutputActivation), strict=True)
}

#: The functions that those modules call, as paths below `torch`.
FUNCTIONS = {row.name: row.function for row in ROWS}

#: The attributes of such a module when it is made without arguments, if it has any. With other
#: values, as in nn.Softplus(beta=2), it computes another function.
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
