"""All kinds of cases, and their frequencies."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import ExitStack

from .case import Case
from .functions import (
    check_gradients,
    jacobian_and_linearize,
    public_loss_and_grads,
    public_relu_mlp,
)
from .modules import from_sequential, fuse, module
from .operators import (
    op_backward,
    op_backward_vjp,
    op_forward,
    op_loss_and_grads,
    op_recompute_backward,
)
from .transforms import fake, transforms
from .verdict import Wrong

#: The kinds of cases, with their relative frequency.
KINDS: dict[Callable[[Case], str], int] = {
    op_forward: 6,
    op_backward: 6,
    op_backward_vjp: 4,
    op_recompute_backward: 4,
    op_loss_and_grads: 4,
    public_relu_mlp: 8,
    public_loss_and_grads: 2,
    jacobian_and_linearize: 2,
    check_gradients: 1,
    transforms: 1,
    fake: 1,
    module: 2,
    fuse: 2,
    from_sequential: 1,
}


def run_case(seed: object, number: int) -> tuple[str, str]:
    """Runs a case and returns its kind and its result. `Wrong` contains the case's whole log."""
    case = Case(seed, number)
    kind = case.r.choices([*KINDS], [*KINDS.values()])[0]
    try:
        with ExitStack() as stack:
            stack.enter_context(case.settings())
            return kind.__name__, kind(case)
    except Exception as error:
        said = str(error) if isinstance(error, Wrong) else traceback.format_exc(limit=-4)
        parts = [f"case {number}, {kind.__name__}: {said}", *case.log]
        raise Wrong("\n    ".join(parts)) from None
