"""Timing by turns: candidates share one process, one set of tensors and one clock.

The speed of a shared machine drifts by half within minutes, so a time by itself
says little. Here every round lets each candidate run for a turn, in an order
that rotates from round to round; the first call of a turn is not counted; and
the figure is the median over the rounds of a candidate's time divided by the
baseline's time in the same round.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch

import relu_mlp


@dataclass
class Figure:
    """What the turns said of one candidate."""

    case: str
    candidate: str
    median_us: float
    ratio: float  #: median of (time / the baseline's time) over the rounds
    ratio_low: float  #: 95 % confidence interval of that median
    ratio_high: float

    def __str__(self) -> str:
        return (
            f"{self.case:<34} {self.candidate:<14} {self.median_us:>9.1f} us   "
            f"{self.ratio:.3f}  [{self.ratio_low:.3f}, {self.ratio_high:.3f}]"
        )


def take_turns(
    case: str, candidates: dict[str, Callable[[], object]], rounds: int = 45, turn_ms: float = 20
) -> list[Figure]:
    """Times the candidates against the first of them.

    Args:
        case: what is timed, for the report.
        candidates: functions by name; the first is the baseline.
        rounds: how many turns each gets.
        turn_ms: how long a turn takes, roughly.
    """
    names = list(candidates)
    for function in candidates.values():  # warm up
        for _ in range(20):
            function()
    start = time.perf_counter()
    candidates[names[0]]()
    calls = max(3, math.ceil(turn_ms / 1e3 / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in names}
    for n in range(rounds):
        for name in names[n % len(names) :] + names[: n % len(names)]:
            function = candidates[name]
            function()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            times[name].append((time.perf_counter() - start) / calls)
    return [_figure(case, name, times[name], times[names[0]]) for name in names]


def _figure(case: str, name: str, times: list[float], baseline: list[float]) -> Figure:
    ratios = sorted(mine / its for mine, its in zip(times, baseline, strict=True))
    # The median lies between these order statistics with 95 % probability
    # (normal approximation to the binomial distribution).
    half = 1.96 * math.sqrt(len(ratios)) / 2
    low = max(0, math.floor(len(ratios) / 2 - half))
    high = min(len(ratios) - 1, math.ceil(len(ratios) / 2 + half))
    return Figure(
        case,
        name,
        round(statistics.median(times) * 1e6, 2),
        round(statistics.median(ratios), 4),
        round(ratios[low], 4),
        round(ratios[high], 4),
    )


def machine() -> dict[str, object]:
    """What a result is worth nothing without."""
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
    return {
        "date": date.today().isoformat(),
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "relu_mlp": relu_mlp.__version__,
        "compiler": relu_mlp.build_info().compiler,
    }


def write(name: str, figures: list[Figure]) -> Path:
    """Keeps figures and machine as results/NAME.json."""
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    document = {"machine": machine(), "figures": [asdict(figure) for figure in figures]}
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path
