"""Support for TorchScript, which can't compile the modules' `forward`.

PyTorch has deprecated TorchScript. Other files contain only the branch in a `forward` that leads
here. The ``__jit_..__`` attributes are private names of PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import checks
from ._torch_private import children_of
from .ops import extension, implementation_for

if TYPE_CHECKING:
    from .run import Run


class Scriptable(nn.Sequential):
    """The `forward` that TorchScript compiles.

    Each run of children that the operators serve when the module is scripted is one operator.
    """

    __constants__ = ("_script_steps",)
    __jit_unused_properties__ = ("_script_steps",)
    __jit_ignored_attributes__ = ("recompute",)

    @property
    def _script_steps(self) -> tuple[str, ...]:
        """A step for each child: "call" it, "gather" its parameters, or run the operator with the
        output activation that the step names, because a run ends with this child."""
        steps = ["call"] * len(children_of(self))
        for position, run in self._find_runs():
            first = run.weights[0]
            if first.dtype in checks.DTYPES and implementation_for(first) is extension:
                gathered = ["gather"] * (len(run.children) - 1)
                steps[position : position + len(run.children)] = [*gathered, run.activation]
        return tuple(steps)

    def _find_runs(self) -> list[tuple[int, Run]]:
        """The runs that become one operator, each with the position of its first child."""
        raise NotImplementedError

    def _scripted_forward(self, input: Tensor) -> Tensor:
        """TorchScript unrolls the loop. Branches on constants are not in the graph."""
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for step, child in zip(self._script_steps, self):  # noqa: B905, TorchScript has no `strict`
            if step == "call":
                input = child(input)
            else:
                if hasattr(child, "weight"):
                    weights.append(child.weight)  # type: ignore[arg-type]
                    bias = input.new_empty(0) if child.bias is None else child.bias
                    biases.append(bias)  # type: ignore[arg-type]
                if step != "gather":
                    input = torch.ops.relu_mlp.relu_mlp(input, weights, biases, step)
                    weights = []
                    biases = []
        return input
