"""Timing by turns: the candidates share one process, one set of tensors and one clock.

The speed of a shared machine drifts by half within minutes, so a time alone says little. Here
each candidate runs for a turn in every round. The order rotates from round to round. The first
call of a turn is not counted, unless calls are long. The figure is the median over the rounds
of a candidate's time divided by the baseline's time in the same round.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from ... import __version__, build_info

#: For calls at least this long the first call of a turn counts too: otherwise a slow case would
#: take twice as long. In steps of 0.2 to 1.5 s on a busy machine the first call took 0.94 to 1.02
#: of the time of the second (medians of 21 series), and was not slower on the whole.
LONG_CALL_S = 0.1


@dataclass
class Figure:
    """The result of one candidate."""

    case: str
    candidate: str
    median_us: float
    ratio: float  #: median of (time / the baseline's time) over the rounds
    ratio_low: float  #: 95 % confidence interval of that median
    ratio_high: float

    def __str__(self) -> str:
        return f"{self.case:<34} {self.without_case()}"

    def without_case(self) -> str:
        return (
            f"{self.candidate:<14} {self.median_us:>9.1f} us   "
            f"{self.ratio:.3f}  [{self.ratio_low:.3f}, {self.ratio_high:.3f}]"
        )


def take_turns(
    case: str, candidates: dict[str, Callable[[], object]], rounds: int = 45, turn_ms: float = 20
) -> list[Figure]:
    """Times the candidates against the first of them.

    Args:
        case: the name of the case, for the report.
        candidates: functions by name; the first is the baseline.
        rounds: the number of turns of each candidate.
        turn_ms: the duration of a turn, roughly.
    """
    return figures(case, time_by_turns(candidates, rounds, turn_ms, fewest_calls=3))


def time_by_turns(
    candidates: dict[str, Callable[[], object]],
    rounds: int = 45,
    turn_ms: float = 20,
    *,
    fewest_calls: int = 1,
    fewest_rounds: int = 25,
    budget_s: float = math.inf,
) -> dict[str, list[float]]:
    """The seconds per call of each candidate in each round.

    A turn of a slow candidate is a single call. A case that has taken `budget_s` ends after
    `fewest_rounds`.
    """
    names = list(candidates)
    seconds = {name: _warm_up(function) for name, function in candidates.items()}
    calls = {name: max(fewest_calls, math.ceil(turn_ms / 1e3 / seconds[name])) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for n in range(rounds):
        for name in names[n % len(names) :] + names[: n % len(names)]:
            function = candidates[name]
            if seconds[name] < LONG_CALL_S:
                function()
            start = time.perf_counter()
            for _ in range(calls[name]):
                function()
            times[name].append((time.perf_counter() - start) / calls[name])
        if n + 1 >= fewest_rounds and time.perf_counter() - begin > budget_s:
            break
    return times


def _warm_up(function: Callable[[], object], calls: int = 20, enough_s: float = 0.2) -> float:
    """Calls a function at least twice, and returns the shortest time in seconds."""
    function()
    begin = start = time.perf_counter()
    shortest = math.inf
    for _ in range(calls - 1):
        function()
        end = time.perf_counter()
        shortest = min(shortest, end - start)
        if end - begin > enough_s:
            break
        start = end
    return shortest


def figures(case: str, times: dict[str, list[float]]) -> list[Figure]:
    """The results of `time_by_turns`, whose first candidate is the baseline."""
    baseline = next(iter(times.values()))
    return [
        Figure(
            case,
            name,
            round(statistics.median(mine) * 1e6, 2),
            *(round(value, 4) for value in median_of_ratios(mine, baseline)),
        )
        for name, mine in times.items()
    ]


def median_of_ratios(
    numerators: Sequence[float], denominators: Sequence[float]
) -> tuple[float, float, float]:
    """The median of the ratios round by round, and its 95 % confidence interval."""
    ratios = sorted(above / below for above, below in zip(numerators, denominators, strict=True))
    # The median lies between these order statistics with 95 % probability
    # (normal approximation to the binomial distribution).
    half = 1.96 * math.sqrt(len(ratios)) / 2
    low = max(0, math.floor(len(ratios) / 2 - half))
    high = min(len(ratios) - 1, math.ceil(len(ratios) / 2 + half))
    return statistics.median(ratios), ratios[low], ratios[high]


def machine() -> dict[str, object]:
    """The machine and the versions, without which a result is worthless."""
    model = platform.processor() or "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(
            line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line
        )
        fields = {name.strip(): value.strip() for name, value in fields.items()}
        model = (
            f"{fields.get('model name', model)} (family {fields.get('cpu family')}, "
            f"model {fields.get('model')})"
        )
    built = build_info()
    return {
        "date": date.today().isoformat(),
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "relu_mlp": __version__,
        "compiler": built.compiler,
        # None if the reference runs, in Python.
        "instruction_set": built.instruction_set if built.runs_on_cpu == "extension" else None,
    }
