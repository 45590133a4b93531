"""What TorchScript compiles of the modules, whose Python it can't read."""

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
    """What TorchScript compiles in the place of `forward`, which it can't read.

    The children's runs as they are when the module is scripted, each one operator.
    """

    __constants__ = ("_script_steps",)
    __jit_unused_properties__ = ("_script_steps",)
    __jit_ignored_attributes__ = ("recompute",)

    @property
    def _script_steps(self) -> tuple[str, ...]:
        """What to do at each child: "call" it, "gather" it for a run, or end the run: an
        output activation."""
        steps = ["call"] * len(children_of(self))
        for position, run in self._find_runs():
            first = run.weights[0]
            if first.dtype in checks.DTYPES and implementation_for(first) is extension:
                gathered = ["gather"] * (len(run.children) - 1)
                steps[position : position + len(run.children)] = [*gathered, run.activation]
        return tuple(steps)

    def _find_runs(self) -> list[tuple[int, Run]]:
        """The runs that are served as one operator, and where among the children each begins."""
        raise NotImplementedError

    def _scripted_forward(self, input: Tensor) -> Tensor:
        """TorchScript unrolls the loop; what is decided by constants is not in the graph."""
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for step, child in zip(self._script_steps, self):  # noqa: B905, it knows no `strict`
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
