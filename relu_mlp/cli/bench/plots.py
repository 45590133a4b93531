"""Pictures of the CSV files: speedup.png, roofline.png, rows.png and memory.png."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ..files import write
from .report import Row, read_suite

COLORS = {
    "eager": "#8c8c8c",
    "compile": "#dd8452",
    "by hand": "#937860",
    "jax": "#55a868",
    "relu_mlp": "#4c72b0",
    "recompute": "#c44e52",
}
DTYPE_COLORS = {"float32": "#4c72b0", "bfloat16": "#dd8452"}


def draw(directory: Path) -> None:
    """Draws pictures of the CSV files in a folder."""
    if (directory / "suite.csv").exists():
        rows = read_suite(directory / "suite.csv")
        draw_speedup(rows, directory / "speedup.png")
        draw_roofline(rows, directory / "roofline.png")
    if (directory / "rows.csv").exists():
        draw_lines(
            directory / "rows.csv",
            "ns_per_row",
            "time of a training step per row (ns)",
            "64-64-64, float32: time per row",
        )
    if (directory / "memory.csv").exists():
        draw_lines(
            directory / "memory.csv",
            "peak_mib",
            "peak memory of a training step (MiB)",
            "64-1024-64, float32: memory",
        )


def draw_speedup(rows: Sequence[Row], path: Path) -> None:
    """A panel for each case, with a bar for each shape and dtype."""
    rows = [row for row in rows if row.speedup]
    cases = list(dict.fromkeys(row.case for row in rows))
    shapes = list(dict.fromkeys(row.shape for row in rows))
    if not cases:
        return
    figure, panels = panels_for(len(cases), shapes)
    for axes, case in zip(panels, cases, strict=True):
        mine = [row for row in rows if row.case == case]
        for n, dtype in enumerate(dtypes := list(dict.fromkeys(row.dtype for row in mine))):
            bars = [row for row in mine if row.dtype == dtype]
            axes.barh(
                [shapes.index(row.shape) + offset(n, len(dtypes)) for row in bars],
                [row.speedup or 0 for row in bars],
                0.8 / len(dtypes),
                xerr=[
                    [(row.speedup or 0) - (row.speedup_low or 0) for row in bars],
                    [(row.speedup_high or 0) - (row.speedup or 0) for row in bars],
                ],
                color=DTYPE_COLORS[dtype],
                error_kw={"elinewidth": 0.8},
                label=dtype,
            )
        axes.axvline(1, color="black", linewidth=0.8)
        opponents = dict.fromkeys(str(row.against) for row in mine)
        axes.set(title=case, xlabel=f"times as fast as {' or '.join(opponents)}")
    save(figure, path)


def draw_roofline(rows: Sequence[Row], path: Path) -> None:
    """A panel for each case and dtype: how far each candidate is from the limit."""
    rows = [row for row in rows if row.roofline and row.candidate in COLORS]
    shapes = list(dict.fromkeys(row.shape for row in rows))
    groups = list(dict.fromkeys((row.case, row.dtype) for row in rows))
    if not groups:
        return
    figure, panels = panels_for(len(groups), shapes)
    for axes, group in zip(panels, groups, strict=True):
        mine = [row for row in rows if (row.case, row.dtype) == group]
        for name in dict.fromkeys(row.candidate for row in mine):
            points = [row for row in mine if row.candidate == name]
            axes.plot(
                [row.roofline or math.nan for row in points],
                [shapes.index(row.shape) for row in points],
                "o" if name == "relu_mlp" else "|",
                markersize=7 if name == "relu_mlp" else 11,
                markeredgewidth=2,
                markerfacecolor="none",
                color=COLORS[name],
                label=name,
            )
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=" ".join(group), xscale="log", xlabel="time / roofline's time")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    save(figure, path)


def draw_lines(source: Path, column: str, label: str, title: str) -> None:
    """A column of a CSV file over the number of rows, with a line for each candidate.

    The picture has the name of the file, with the ending .png.
    """
    with source.open(newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(record["candidate"] for record in records):
        points = [record for record in records if record["candidate"] == name]
        axes.plot(
            [int(point["rows"]) for point in points],
            [float(point[column]) for point in points],
            "o-",
            color=COLORS[name],
            label=name,
        )
    axes.set(title=title, xlabel="rows of x", ylabel=label)
    axes.set_xscale("log", base=2)
    if column == "peak_mib":
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    save(figure, source.with_suffix(".png"))


def panels_for(count: int, shapes: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Panels side by side that share the axis of shapes, the first shape at the top."""
    size = 2 + 2.6 * count, 1.5 + 0.4 * len(shapes)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(1, count, sharey=True, squeeze=False)[0])
    axes[0].set_yticks(range(len(shapes)), shapes)
    axes[0].set(ylabel="rows x in-hidden-out", ylim=(len(shapes) - 0.5, -0.5))
    return figure, axes


def offset(n: int, count: int) -> float:
    """The place of the n-th bar of a group that is 0.8 wide, relative to its middle."""
    return 0.8 * ((n + 0.5) / count - 0.5)


def save(figure: Figure, path: Path) -> None:
    """Saves a figure with one legend: a name has the same color in all panels."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles)
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write(path, buffer.getvalue())
