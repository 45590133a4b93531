"""The plan of a benchmark, and an estimate of its duration."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import memory, roofline
from .candidates import WIDE, Shape, Step
from .turns import LONG_CALL_S

#: The cases that are measured for every shape; loss_and_grads in float32 only.
SHAPE_CASES = ("training", "inference", "loss_and_grads")
#: Cases with networks of their own, in float32.
OTHER_CASES = ("rows", "memory", "recompute")

#: The roofline matters from this many operations on. Below, overhead dominates.
ROOFLINE_FROM = 50e6

ROUNDS, FEWEST_ROUNDS, TURN_MS = 45, 25, 10
BUDGET_S = 5  #: a case that takes longer ends after FEWEST_ROUNDS

#: The curve over the number of rows. Each point ends like a case, after fewer rounds.
LENGTHS = tuple(2**n for n in range(12, 21))
LENGTH_WIDTHS = (64, 64, 64)
LENGTH_FEWEST_ROUNDS, LENGTH_BUDGET_S = 7, 5


@dataclass(frozen=True)
class Plan:
    """The cases, shapes and dtypes to measure."""

    shapes: Sequence[Shape]
    cases: Sequence[str]  #: from SHAPE_CASES and OTHER_CASES
    dtypes: Sequence[torch.dtype]
    threads: int
    input_grad: bool = False  #: whether the input of a training step needs a gradient
    rounds: int = ROUNDS  #: the largest number of rounds
    lengths: Sequence[int] = LENGTHS  #: the points of the case "rows"
    memory_rows: Sequence[int] = tuple(memory.ROWS)  #: "recompute" has the last

    def dtypes_of(self, case: str) -> Sequence[torch.dtype]:
        """The dtypes in which one of the SHAPE_CASES is measured."""
        if case == "loss_and_grads":
            return [dtype for dtype in self.dtypes if dtype is torch.float32]
        return self.dtypes


class Speeds(NamedTuple):
    """The results of the roofline's probes for a dtype."""

    rate: float  #: operations per second
    bandwidth: float  #: bytes per second
    probing: float  #: seconds for one call of each probe


def estimated_seconds(plan: Plan) -> float:
    """Roughly how long a plan takes, estimated from the present rate and bandwidth."""
    speeds = functools.cache(_speeds_just_now)
    total = 0.0
    for case, candidates in {"training": 5, "inference": 4, "loss_and_grads": 3}.items():
        if case in plan.cases:
            for dtype in plan.dtypes_of(case):
                total += sum(
                    _seconds_of(shape, case, dtype, candidates, plan.rounds, speeds(dtype))
                    for shape in plan.shapes
                )
    if {"training", "inference"} & set(plan.cases):
        total += 10 + 4 * len(plan.dtypes) * len(plan.shapes)  # torch.compile starts slowly
    if "rows" in plan.cases:
        total += 1.3 * LENGTH_BUDGET_S * len(plan.lengths)
    if "memory" in plan.cases:
        total += 4 * len(memory.CANDIDATES) * len(plan.memory_rows)
    if "recompute" in plan.cases:
        shape, dtype = (plan.memory_rows[-1], *WIDE), torch.float32
        total += _seconds_of(shape, "training", dtype, 2, plan.rounds, speeds(dtype))
    return total


def _seconds_of(
    shape: Shape, case: str, dtype: torch.dtype, candidates: int, rounds: int, speeds: Speeds
) -> float:
    """Roughly how long one case takes at one shape."""
    # Empirical factors: eager comes this close to the limits.
    operations = roofline.operations(shape, case)
    step = 1.1 * operations / speeds.rate
    step += 4 * roofline.compulsory_bytes(shape, case, dtype) / speeds.bandwidth
    uncounted = step if step < LONG_CALL_S else 0.0
    a_round = candidates * (uncounted + max(step, TURN_MS / 1e3))
    if operations >= ROOFLINE_FROM:
        a_round += 2 * speeds.probing
    return min(rounds, max(FEWEST_ROUNDS, BUDGET_S / a_round)) * a_round + candidates * 0.3


def _speeds_just_now(dtype: torch.dtype) -> Speeds:
    mm, copied = (_shortest_of_three(probe) for probe in roofline.probes(dtype).values())
    return Speeds(*roofline.rates(mm, copied), mm + copied)


def _shortest_of_three(step: Step) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)
