"""`FusedSequential`: an `nn.Sequential` that runs the ReLU networks among its children fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, interception
from .._torch_private import children_of, copy_to_script_wrapper, is_scripting
from ..functional import call_operators, is_served, leaves_python
from ..interception import are_layers_replaced
from ..modules import slice_or_child
from ..ops import node
from ..run import Run, find_run
from ..scripting import Scriptable
from .conditions import does_nothing

_is_compiling = torch.compiler.is_compiling


class FusedSequential(Scriptable):
    """The class that `fuse` gives to an `nn.Sequential` with runs among its children.

    It holds the same children and calls them in the same order, except that each run of Linear,
    ReLU, ..., Linear is one operator (see `relu_mlp` for the formula and the dtypes). Within a run,
    Identity is skipped, and so is Dropout in eval mode or with p = 0.

    Shape:
        As for the `nn.Sequential`.

    Raises:
        TypeError, RuntimeError: as the `nn.Sequential` does, or for a run as in `relu_mlp`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return self._scripted_forward(input)
        elif leaves_python():
            return super().forward(input)
        else:
            if are_layers_replaced() or type(self).__iter__ is not interception.iterate:
                return super().forward(input)
            children = list(children_of(self).values())
            position = 0
            while position < len(children):
                found = self._call_run(children, position, input)
                if found is None:
                    input = children[position](input)
                    position += 1
                else:
                    input, position = found
            return input

    def _call_run(
        self, children: list[nn.Module], position: int, input: Tensor
    ) -> tuple[Tensor, int] | None:
        """The output of the run that begins at a position, and the position after it.

        None if no run begins there.
        """
        if node is not None and not _is_compiling():
            found: Any = node.call_run(self, position, input)
            if found is not NotImplemented:
                return found
        if not is_served(input) or are_layers_replaced():
            return None
        run, end = run_at(children, position, does_nothing)
        if run is None:
            return None
        functional.check_empty_biases(run.weights, run.biases)
        return call_operators(input, run.weights, run.biases, run.activation, False), end

    def _find_runs(self) -> list[tuple[int, Run]]:
        children = list(children_of(self).values())
        runs: list[tuple[int, Run]] = []
        position = 0
        while position < len(children) and not are_layers_replaced():
            # A script may leave eval mode later, so nothing is skipped.
            run, end = run_at(children, position, lambda child: False)
            if run is not None:
                runs.append((position, run))
            position = max(end, position + 1)
        return runs

    @copy_to_script_wrapper
    def __getitem__(self, index: Any) -> Any:
        return slice_or_child(self, index)


def run_at(
    children: list[nn.Module], start: int, is_skipped: Callable[[nn.Module], bool]
) -> tuple[Run | None, int]:
    """The run of two Linears or more that begins at `start`, or None; and where it ends."""
    kept = []
    for n in range(start, len(children)):
        if children[n] is None:  # calling it raises, as it does natively
            break
        if not is_skipped(children[n]):
            kept.append(n)
    run = find_run([children[n] for n in kept])
    if run is None or len(run.weights) < 2:
        return None, start
    return run, kept[len(run.children) - 1] + 1
