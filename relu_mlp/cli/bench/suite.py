"""The suite: runs a plan on the CPU, case by case, and stores the results.

Training steps and inference are compared with eager `nn.Sequential`, with `torch.compile` of
it, with the training step written by hand in PyTorch's operations, and with the roofline of the
machine. `loss_and_grads` is compared with eager and, if it is installed, with JAX. Further
cases are the time per row and the memory of one network over the number of rows, and the cost
of `recompute=True`.

Figures are medians of ratios, measured by turns (see turns.py), with 95 % confidence intervals.
"eager again" is a second copy of the baseline: its distance from 1 shows the noise.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from ... import ReluMLP
from ..files import write
from . import memory, report, roofline
from .candidates import (
    WIDE,
    Job,
    Step,
    inference_job,
    loss_job,
    name_of,
    name_of_dtype,
    networks,
    recompute_job,
    training_job,
    training_step,
)
from .plan import (
    BUDGET_S,
    FEWEST_ROUNDS,
    LENGTH_BUDGET_S,
    LENGTH_FEWEST_ROUNDS,
    LENGTH_WIDTHS,
    ROOFLINE_FROM,
    SHAPE_CASES,
    TURN_MS,
    Plan,
    estimated_seconds,
)
from .report import LengthRow, MemoryRow, Row
from .turns import Figure, figures, machine, median_of_ratios, time_by_turns


def run(plan: Plan, directory: Path) -> None:
    """Measures, prints its progress, and writes CSV files and suite.json.

    suite.csv, rows.csv and memory.csv are written if the plan has cases for them. They replace
    files of these names. suite.json describes the machine.
    """
    torch.set_num_threads(plan.threads)
    torch.manual_seed(0)
    progress = announced(plan)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"load average {load:.1f}: figures are worth little while other programs run")
    suite: list[Row] = []
    try:
        for job in jobs(plan):
            progress(job)
            suite += measured(job, plan.rounds)
    finally:  # also after an interruption
        if suite:
            lines = report.summary(suite)
            print("", *lines, "", sep="\n")
            keep(directory, "suite.csv", suite, jax=version_of("jax"), load=load, summary=lines)
    if "rows" in plan.cases:
        keep(directory, "rows.csv", over_lengths(plan, progress))
    if "memory" in plan.cases and not memory.CAN_BE_MEASURED:
        print("without memory: it is read from /proc, which only Linux has")
    elif "memory" in plan.cases:
        keep(directory, "memory.csv", memory_over_rows(plan, progress))


def announced(plan: Plan) -> Callable[[object], None]:
    """Prints how long the plan will take. Returns a function that prints the progress."""
    estimate = duration(estimated_seconds(plan))
    print(f"about {estimate}; threads of PyTorch: {plan.threads}; JAX uses its own", flush=True)
    begin = time.perf_counter()

    def progress(what: object) -> None:
        print(f"[{duration(time.perf_counter() - begin)} of about {estimate}] {what}", flush=True)

    return progress


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def jobs(plan: Plan) -> Iterator[Job]:
    """The cases that are measured for every shape, and recompute."""
    for dtype in plan.dtypes:
        cases = [
            case for case in SHAPE_CASES if case in plan.cases and dtype in plan.dtypes_of(case)
        ]
        for shape in plan.shapes if cases else []:
            nets = networks(shape, dtype)
            x, grad_output = torch.randn(shape[0], shape[1]), torch.randn(shape[0], shape[-1])
            x, grad_output = x.to(dtype), grad_output.to(dtype)
            if "training" in cases:
                yield training_job(shape, nets, x, grad_output, plan.input_grad)
            if "inference" in cases:
                yield inference_job(shape, nets, x)
            if "loss_and_grads" in cases:
                yield loss_job(shape, nets, x, grad_output)
    if "recompute" in plan.cases:
        yield recompute_job(plan.memory_rows[-1])


def measured(job: Job, rounds: int) -> list[Row]:
    """Times a job, prints its figures, and returns them."""
    candidates = runnable(job.candidates)
    operations = roofline.operations(job.shape, job.case, job.input_grad)
    if job.has_roofline and operations >= ROOFLINE_FROM:
        candidates |= roofline.probes(job.dtype)
    with torch.compiler.set_stance("fail_on_recompile"):
        times = time_by_turns(
            candidates,
            rounds,
            TURN_MS,
            fewest_rounds=min(FEWEST_ROUNDS, rounds),
            budget_s=BUDGET_S,
        )
    limits = None
    if roofline.MM in times:
        limits = roofline.limits(job.shape, job.case, job.dtype, job.input_grad, times)
    rows = []
    for figure in figures(str(job), times):
        distance = None
        if limits and figure.candidate in job.candidates:
            distance = round(median_of_ratios(times[figure.candidate], limits)[0], 3)
        of_roofline = f"   {distance:.2f} x the roofline" if distance else ""
        print(f"  {figure.without_case()}{of_roofline}")
        rows.append(row_of(job, figure, len(times[figure.candidate]), distance))
    add_speedup(rows, times, job.alternatives)
    return rows


def row_of(job: Job, figure: Figure, rounds: int, distance: float | None) -> Row:
    return Row(
        shape=name_of(job.shape),
        case=job.case_name,
        dtype=name_of_dtype(job.dtype),
        threads=torch.get_num_threads(),
        candidate=figure.candidate,
        rounds=rounds,
        median_us=figure.median_us,
        ratio=figure.ratio,
        low=figure.ratio_low,
        high=figure.ratio_high,
        roofline=distance,
    )


def runnable(candidates: dict[str, Step]) -> dict[str, Step]:
    """The candidates that run. torch.compile compiles now, and fails without a C++ compiler."""
    result = {}
    for name, step in candidates.items():
        try:
            step()
            step()
            result[name] = step
        except Exception as problem:
            if name != "compile":
                raise
            # The first line may only say that the backend raised.
            reason = " ".join(str(problem).split("\n")[:2])
            print(f"  without torch.compile: {reason}")
    return result


def add_speedup(
    rows: list[Row], times: dict[str, list[float]], alternatives: Sequence[str]
) -> None:
    """Fills in the speed-up of the layer over the best alternative."""
    there = [row for row in rows if row.candidate in alternatives]
    if there:
        best = min(there, key=lambda row: row.ratio).candidate
        row = next(row for row in rows if row.candidate == "relu_mlp")
        speedup = median_of_ratios(times[best], times["relu_mlp"])
        row.against = best
        row.speedup, row.speedup_low, row.speedup_high = (round(value, 3) for value in speedup)


def over_lengths(plan: Plan, progress: Callable[[object], None]) -> list[LengthRow]:
    """The time of a float32 training step per row of x, over the number of rows."""
    result = []
    for length in plan.lengths:
        progress(f"{name_of((length, *LENGTH_WIDTHS))} training, per row")
        net = ReluMLP(LENGTH_WIDTHS[0], LENGTH_WIDTHS[1:-1], LENGTH_WIDTHS[-1])
        eager = nn.Sequential(*copy.deepcopy(list(net)))
        x, grad_output = (torch.randn(length, LENGTH_WIDTHS[end]) for end in (0, -1))
        times = time_by_turns(
            {
                "eager": training_step(eager, x, grad_output),
                "relu_mlp": training_step(net, x, grad_output),
            },
            plan.rounds,
            TURN_MS,
            fewest_rounds=LENGTH_FEWEST_ROUNDS,
            budget_s=LENGTH_BUDGET_S,
        )
        for figure in figures(str(length), times):
            print(f"  {figure.without_case()}")
            result.append(
                LengthRow(
                    rows=length,
                    threads=torch.get_num_threads(),
                    candidate=figure.candidate,
                    rounds=len(times["eager"]),
                    ns_per_row=round(figure.median_us * 1e3 / length, 2),
                    ratio=figure.ratio,
                    low=figure.ratio_low,
                    high=figure.ratio_high,
                )
            )
    return result


def memory_over_rows(plan: Plan, progress: Callable[[object], None]) -> list[MemoryRow]:
    """The peak memory of a float32 training step, over the number of rows."""
    result = []
    for rows in plan.memory_rows:
        progress(f"{name_of((rows, *WIDE))} training, peak memory")
        for candidate in memory.CANDIDATES:
            peak = memory.peak_of_a_step(rows, candidate, plan.threads) / 2**20
            print(f"  {candidate:<20} {peak:>8.1f} MiB")
            result.append(MemoryRow(rows, plan.threads, candidate, round(peak, 1)))
    return result


def keep(
    directory: Path,
    name: str,
    rows: Sequence[Row] | Sequence[LengthRow] | Sequence[MemoryRow],
    **more: object,
) -> None:
    """Writes a CSV file, and a description of the machine under its name in suite.json."""
    report.write_csv(directory / name, rows)
    path = directory / "suite.json"
    about: dict[str, object] = {}
    with suppress(OSError, ValueError, TypeError):  # missing or damaged: it is replaced
        about = dict(json.loads(path.read_text("utf-8")))
    about[name] = {**machine(), **more}
    write(path, (json.dumps(about, indent=1) + "\n").encode())


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
