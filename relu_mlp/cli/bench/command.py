"""`relu-mlp bench`: `DESCRIPTION` says what it does."""

from __future__ import annotations

import argparse
import itertools
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import torch

from .. import Missing, Problem, needs
from ..arguments import count, network_shape, threads
from ..files import make_folder
from ..info import checked_build_info
from . import memory, report, suite
from .candidates import SHAPES, Shape
from .plan import FEWEST_ROUNDS, LENGTHS, OTHER_CASES, ROUNDS, SHAPE_CASES, Plan

DESCRIPTION = """\
Compare eager, torch.compile and this package side by side, on the CPU.

Measures training steps and inference of the networks of the suite, or of the given
sizes, against nn.Sequential and torch.compile of it; and loss_and_grads against JAX,
or against eager if JAX is not installed. The suite also measures time per row and
memory over the number of rows, and the cost of recompute=True. The candidates take
turns in one process on the same tensors. A figure is the median of the ratios round
by round, with its 95 % confidence interval. "eager again" is a second copy of the
baseline: its distance from 1 shows the noise.

Writes CSV files, suite.json, which describes the machine, and pictures, if matplotlib
is installed.
"""

EXAMPLE = "relu-mlp bench --shape 256,64,64,8 --case training --dtype float32 --threads 1"

T = TypeVar("T")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUICK_SHAPES: list[Shape] = [(64, 3, 2, 1), (256, 64, 64, 8), (128, 784, 512, 10)]

PICTURES = ("speedup.png", "roofline.png", "rows.png", "memory.png")
RESULTS = ("suite.csv", "rows.csv", "memory.csv", "suite.json", *PICTURES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--shape",
        type=network_shape,
        action="append",
        metavar="SIZES",
        help="rows,in,hidden...,out; may be repeated (default: the suite)",
    )
    add(
        "--case",
        choices=SHAPE_CASES + OTHER_CASES,
        action="append",
        help="may be repeated (default: all; with --shape the first three)",
    )
    add("--dtype", choices=list(DTYPES), action="append", help="may be repeated (default: both)")
    add("--input-grad", action="store_true", help="the input of a training step needs a gradient")
    add("--threads", type=threads, metavar="N", help="threads of PyTorch; JAX uses its own")
    add(
        "--rounds",
        type=count,
        metavar="N",
        help=f"at most this many (default: {ROUNDS}; {FEWEST_ROUNDS} for slow cases)",
    )
    add("--quick", action="store_true", help="a smoke test of a minute, not a measurement")
    add("--out", type=Path, default=Path("bench"), metavar="FOLDER", help="(default: bench)")
    add("--force", action="store_true", help="overwrite earlier results in --out")
    add(
        "--table",
        action="store_true",
        help="only print the results in --out as Markdown",
    )


def run(options: argparse.Namespace) -> int:
    if options.table:
        print(_stored_table(options.out))
        return 0
    plan = _plan(options)
    _check_backend()
    _prepare(options.out, options.force)
    try:
        needs("matplotlib", "bench", "drawing")
        draws = True
    except Missing as missing:  # reported now, while there is time to install it
        print(f"without pictures: {missing}")
        draws = False
    suite.run(plan, options.out)
    for name in PICTURES:  # pictures of earlier results
        (options.out / name).unlink(missing_ok=True)
    if draws:
        from . import plots

        plots.draw(options.out)
    print(f"results are in {options.out}: {', '.join(_results_in(options.out))}")
    return 0


def _plan(options: argparse.Namespace) -> Plan:
    given = options.case or (SHAPE_CASES if options.shape else SHAPE_CASES + OTHER_CASES)
    plan = Plan(
        shapes=_unique(options.shape or (QUICK_SHAPES if options.quick else SHAPES)),
        cases=_unique(given),
        dtypes=[DTYPES[name] for name in _unique(options.dtype or DTYPES)],
        threads=options.threads or torch.get_num_threads(),
        input_grad=options.input_grad,
        rounds=options.rounds or (5 if options.quick else ROUNDS),
        lengths=LENGTHS[:3] if options.quick else LENGTHS,
        memory_rows=memory.ROWS[:1] if options.quick else memory.ROWS,
    )
    if plan.cases == ["loss_and_grads"] and not plan.dtypes_of("loss_and_grads"):
        raise Problem("--case loss_and_grads is measured in float32 only, got --dtype bfloat16")
    for shape in plan.shapes:
        _check_memory(shape, min(dtype.itemsize for dtype in plan.dtypes))
    return plan


def _check_memory(shape: Shape, itemsize: int) -> None:
    """Raises a `Problem` if the widest activation and the weights alone exceed the memory."""
    rows, *widths = shape
    weights = sum(map(math.prod, itertools.pairwise(widths)))
    least = (rows * max(widths) + weights) * itemsize
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if least > there:
        raise Problem(
            f"--shape {','.join(map(str, shape))} takes more than {least // 2**30} GiB, "
            f"and this machine has {there // 2**30}"
        )


def _unique(items: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(items))


def _check_backend() -> None:
    """Prints advice on what could run faster. Raises a `Problem` if the backend can't run."""
    info = checked_build_info()
    if info.runs_on_cpu == "nothing":
        raise Problem(f"RELU_MLP_BACKEND is 'extension', but {info.problem}")
    for line in info.advice():
        print(line)


def _prepare(directory: Path, force: bool) -> None:
    """Makes the folder. Raises a `Problem` if it can't be written to, or has results already."""
    make_folder(directory)
    there = _results_in(directory)
    if there and not force:
        raise Problem(
            f"{directory} already holds {', '.join(there)}: "
            "name another folder with --out, or overwrite with --force"
        )


def _results_in(directory: Path) -> list[str]:
    return [name for name in RESULTS if (directory / name).exists()]


def _stored_table(directory: Path) -> str:
    try:
        return report.markdown(directory)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise Problem(f"--table: no results of relu-mlp bench in {directory}: {error}") from None
