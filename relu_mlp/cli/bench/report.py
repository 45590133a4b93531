"""The results as CSV files, as lines for the terminal, and as Markdown tables."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..files import write
from .candidates import SHAPES, name_of

#: The number of small and narrow shapes, which come first and have a mean of their own.
FIRST = 7

#: The candidates that the terminal shows side by side.
SIDE_BY_SIDE = ("eager", "compile", "jax", "relu_mlp")


@dataclass
class Row:
    """The result of one candidate in one case. None is an empty field in CSV."""

    shape: str
    case: str
    dtype: str
    threads: int
    candidate: str
    rounds: int
    median_us: float
    ratio: float  #: time over the baseline's
    low: float  #: 95 % confidence interval
    high: float
    roofline: float | None = None  #: time over the shortest possible time
    against: str | None = None  #: the fastest alternative, over which the speed-up is taken
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None


@dataclass
class LengthRow:
    """The time of one training step, per row of x."""

    rows: int
    threads: int
    candidate: str
    rounds: int
    ns_per_row: float
    ratio: float
    low: float
    high: float


@dataclass
class MemoryRow:
    """The peak growth of the process in one training step."""

    rows: int
    threads: int
    candidate: str
    peak_mib: float


def write_csv(path: Path, rows: Sequence[Row | LengthRow | MemoryRow]) -> None:
    file = io.StringIO()
    writer = csv.DictWriter(file, [field.name for field in fields(rows[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write(path, file.getvalue().encode())


def read_suite(path: Path) -> list[Row]:
    """The rows of suite.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        return [_row(record) for record in csv.DictReader(file)]


def _row(record: dict[str, str]) -> Row:
    kinds = {"threads": int, "rounds": int}
    text = {"shape", "case", "dtype", "candidate", "against"}
    return Row(
        **{
            name: None if value == "" else value if name in text else kinds.get(name, float)(value)
            for name, value in record.items()
        }  # type: ignore[arg-type]
    )


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(sum(logs := [math.log(value) for value in values]) / len(logs))


def mean_speedup(rows: Sequence[Row], count: int) -> float | None:
    """The geometric mean over the first shapes of the suite; None if one was not measured."""
    measured = {row.shape: row.speedup for row in rows if row.speedup}
    names = [name_of(shape) for shape in SHAPES[:count]]
    if not all(name in measured for name in names):
        return None
    return geometric_mean(measured[name] for name in names)


def by_case(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The results of the layer, by case and dtype."""
    result: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.speedup:
            result.setdefault((row.case, row.dtype), []).append(row)
    return result


def summary(rows: Sequence[Row]) -> list[str]:
    """The results of the suite in lines."""
    return [*side_by_side(rows), *means(rows)]


def side_by_side(rows: Sequence[Row]) -> list[str]:
    """A line for each case: times, the speed-up of the layer, and its distance to the roofline."""
    layers = [row for row in rows if row.speedup]
    if not layers:
        return []
    times = {(_title(row), row.candidate): _time(row.median_us) for row in rows}
    columns = [name for name in SIDE_BY_SIDE if any(row.candidate == name for row in rows)]
    width = max(len(_title(row)) for row in layers)
    lines = [
        f"{'':<{width}}{''.join(f'{name:>10}' for name in columns)}"
        "   speed-up [95 % confidence interval]"
    ]
    for row in layers:
        title = _title(row)
        line = "".join(f"{times.get((title, name), '-'):>10}" for name in columns)
        lines.append(f"{title:<{width}}{line}   {_speedup(row)} over {row.against}")
        if row.roofline:
            lines[-1] += f", {row.roofline:.2f} times the roofline's time"
    return lines


def means(rows: Sequence[Row]) -> list[str]:
    """The means over the lines of `side_by_side`, and the cost of recompute=True."""
    lines = []
    for (case, dtype), mine in by_case(rows).items():
        title = f"{case} {dtype}"
        opponents = " or ".join(dict.fromkeys(str(row.against) for row in mine))
        for count in (FIRST, len(SHAPES)):
            mean = mean_speedup(mine, count)
            if mean:
                lines.append(
                    f"{title}, first {count} shapes: {mean:.2f} times as fast as {opponents}"
                )
        # median_us / ratio is about the median of the baseline.
        distances = [
            row.roofline for row in mine if row.roofline and row.median_us >= 1000 * row.ratio
        ]
        if distances:
            lines.append(
                f"{title}, {len(distances)} shapes that take eager 1 ms or more: "
                f"{geometric_mean(distances):.2f} times the roofline's time"
            )
    lines += [
        f"recompute=True {row.dtype} {row.shape}: takes {row.ratio:.2f} "
        f"[{row.low:.2f}, {row.high:.2f}] times as long"
        for row in rows
        if row.candidate == "recompute"
    ]
    return lines


def markdown(directory: Path) -> str:
    """The contents of suite.csv as Markdown tables."""
    cases = by_case(read_suite(directory / "suite.csv"))
    speed, limits = [], []
    for shape in dict.fromkeys(row.shape for rows in cases.values() for row in rows):
        line = [next((row for row in rows if row.shape == shape), None) for rows in cases.values()]
        speed.append([shape, *map(_speed, line)])
        limits.append([shape, *map(_limit, line)])
    for which, count in (("the first", FIRST), ("all", len(SHAPES))):
        line_of_means = [mean_speedup(rows, count) for rows in cases.values()]
        if any(line_of_means):
            bold = [f"**{mean:.2f}**" if mean else "" for mean in line_of_means]
            speed.append([f"geometric mean of {which} {count}", *bold])
    head = ["rows x in-hidden-out", *(f"{case} {dtype}" for case, dtype in cases)]
    others = [row.against for row in cases.get(("loss_and_grads", "float32"), []) if row.against]
    about = json.loads((directory / "suite.json").read_text("utf-8"))["suite.csv"]
    exception = f" (loss_and_grads: over {' or '.join(dict.fromkeys(others))})" if others else ""
    parts = [
        f"Speed-up over the better of eager and `torch.compile`{exception} "
        "[95 % confidence interval], and time:",
        _table([head, *speed]),
    ]
    if any(any(line[1:]) for line in limits):
        parts += [
            "Time over the roofline's, from 50 million operations on:",
            _table([head, *(line for line in limits if any(line[1:]))]),
        ]
    parts.append(
        f"{about['date']}, {about['processor']}, {about['cores']} cores, {about['threads']} "
        f"threads, PyTorch {about['torch']}, relu_mlp {about['relu_mlp']} "
        f"({about['instruction_set'] or 'in Python'})."
    )
    return "\n\n".join(parts)


def _table(lines: list[list[str]]) -> str:
    """A Markdown table whose first line is the header."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _title(row: Row) -> str:
    return f"{row.shape} {row.case} {row.dtype}"


def _time(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.0f} µs"
    if microseconds < 999.5e3:
        return f"{microseconds / 1e3:.3g} ms"
    return f"{microseconds / 1e6:.3g} s"


def _speedup(row: Row) -> str:
    return f"{row.speedup:.2f} [{row.speedup_low:.2f}, {row.speedup_high:.2f}]"


def _speed(row: Row | None) -> str:
    return "" if row is None or row.speedup is None else f"{_speedup(row)}, {_time(row.median_us)}"


def _limit(row: Row | None) -> str:
    return "" if row is None or row.roofline is None else f"{row.roofline:.2f}"
