"""How fast the layer is: the suite behind `make bench`.

Twelve networks, in training steps and inference, float32 and bfloat16, against
eager `nn.Sequential`, `torch.compile` of it, the training step written by hand
with PyTorch's operations, and the roofline of the machine; `loss_and_grads`
against eager and, where it can be imported, JAX; the time per row and the
memory of one network over the number of rows; and what `recompute=True` costs.
On the CPU.

Figures are medians of ratios taken by turns (see turns.py), over 25 rounds or
more, with 95 % confidence intervals. "eager again" is a second copy of the
baseline: its distance from 1 is what noise can do.

A full run is written to benchmarks/results: CSV files, pictures, and suite.json,
which says on what machine. Anything less goes to build/bench, unless --out says
otherwise.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

import memory
import report
import roofline
from candidates import (
    SHAPES,
    WIDE,
    Job,
    Shape,
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
from relu_mlp import ReluMLP
from report import LengthRow, MemoryRow, Row
from turns import LONG_CALL_S, figures, machine, median_of_ratios, time_by_turns

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = ["training", "inference", "loss_and_grads", "rows", "memory", "recompute"]
QUICK_SHAPES: list[Shape] = [(64, 3, 2, 1), (256, 64, 64, 8), (128, 784, 512, 10)]

LENGTHS = [2**n for n in range(12, 21)]
LENGTH_WIDTHS = (64, 64, 64)

#: The roofline is of interest from so many operations on; below, overhead rules.
ROOFLINE_FROM = 50e6

ROUNDS, FEWEST_ROUNDS, TURN_MS = 45, 25, 10
BUDGET_S = 5  #: a case that takes longer ends after the fewest rounds
#: The same for one point of the curve over the rows.
LENGTH_FEWEST_ROUNDS, LENGTH_BUDGET_S = 7, 5


def main() -> None:
    options = parsed_options()
    if options.table:
        print(report.markdown(options.out))
        return
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    estimate = estimated_seconds(options) / 60
    print(f"{options.threads} threads of PyTorch, JAX has its own; about {estimate:.0f} minutes")
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"load average {load:.1f}: where other programs run, figures are worth little")
    begin = time.perf_counter()

    def progress(what: object) -> None:
        minutes = (time.perf_counter() - begin) / 60
        print(f"[{minutes:.1f} of about {estimate:.0f} min] {what}", flush=True)

    suite: list[Row] = []
    for job in jobs(options):
        progress(job)
        suite += measured(job, options.rounds)
    if suite:
        lines = report.summary(suite)
        print(*lines, sep="\n")
        keep(options.out, "suite.csv", suite, jax=version_of("jax"), load=load, summary=lines)
    if "rows" in options.case:
        keep(options.out, "rows.csv", over_lengths(options, progress))
    if "memory" in options.case and not memory.CAN_BE_MEASURED:
        print("without memory: it is read from /proc, which only Linux has")
    elif "memory" in options.case:
        keep(options.out, "memory.csv", memory_over_rows(options, progress))
    draw(options.out)
    progress(f"written to {options.out}")


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """The cases that are measured shape by shape."""
    for dtype in (DTYPES[name] for name in options.dtype):
        for shape in options.shape:
            nets = networks(shape, dtype)
            x, grad_output = torch.randn(shape[0], shape[1]), torch.randn(shape[0], shape[-1])
            x, grad_output = x.to(dtype), grad_output.to(dtype)
            if "training" in options.case:
                yield training_job(shape, nets, x, grad_output, options.input_grad)
            if "inference" in options.case:
                yield inference_job(shape, nets, x)
            if "loss_and_grads" in options.case and dtype is torch.float32:
                yield loss_job(shape, nets, x, grad_output)
    if "recompute" in options.case:
        yield recompute_job(options.memory_rows[-1])


def measured(job: Job, rounds: int) -> list[Row]:
    """Times a job, prints its figures, and returns them."""
    candidates = able(job.candidates)
    baseline = next(iter(candidates))
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
        print(f"  {figure.without_case()}", end="")
        row = Row(
            shape=name_of(job.shape),
            case=job.case_name,
            dtype=name_of_dtype(job.dtype),
            threads=torch.get_num_threads(),
            candidate=figure.candidate,
            rounds=len(times[baseline]),
            median_us=figure.median_us,
            ratio=figure.ratio,
            low=figure.ratio_low,
            high=figure.ratio_high,
        )
        if limits and figure.candidate in job.candidates:
            row.roofline = round(median_of_ratios(times[figure.candidate], limits)[0], 3)
            print(f"   {row.roofline:.2f} x the roofline", end="")
        print()
        rows.append(row)
    add_speedup(rows, times, job.alternatives)
    return rows


def able(candidates: dict[str, Step]) -> dict[str, Step]:
    """Those that run. torch.compile compiles now; it needs a C++ compiler, and may find none."""
    result = {}
    for name, step in candidates.items():
        try:
            step()
            step()
            result[name] = step
        except Exception as problem:
            if name != "compile":
                raise
            print(f"  without torch.compile: {str(problem).splitlines()[0]}")
    return result


def shortest_of_three(step: Step) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)


def add_speedup(
    rows: list[Row], times: dict[str, list[float]], alternatives: Sequence[str]
) -> None:
    """Says of the layer how much faster it is than the best alternative."""
    there = [row for row in rows if row.candidate in alternatives]
    if there:
        best = min(there, key=lambda row: row.ratio).candidate
        row = next(row for row in rows if row.candidate == "relu_mlp")
        speedup = median_of_ratios(times[best], times["relu_mlp"])
        row.against = best
        row.speedup, row.speedup_low, row.speedup_high = (round(value, 3) for value in speedup)


def over_lengths(
    options: argparse.Namespace, progress: Callable[[object], None]
) -> list[LengthRow]:
    """The time of a float32 training step per row of x, over the number of rows."""
    result = []
    for length in options.lengths:
        progress(f"{name_of((length, *LENGTH_WIDTHS))} training, per row")
        net = ReluMLP(LENGTH_WIDTHS[0], LENGTH_WIDTHS[1:-1], LENGTH_WIDTHS[-1])
        eager = nn.Sequential(*copy.deepcopy(list(net)))
        x, grad_output = (torch.randn(length, LENGTH_WIDTHS[end]) for end in (0, -1))
        times = time_by_turns(
            {
                "eager": training_step(eager, x, grad_output),
                "relu_mlp": training_step(net, x, grad_output),
            },
            options.rounds,
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


def memory_over_rows(
    options: argparse.Namespace, progress: Callable[[object], None]
) -> list[MemoryRow]:
    """The peak memory of a float32 training step, over the number of rows."""
    result = []
    for rows in options.memory_rows:
        progress(f"{name_of((rows, *WIDE))} training, peak memory")
        for candidate in memory.CANDIDATES:
            peak = memory.peak_of_a_step(rows, candidate, options.threads) / 2**20
            print(f"  {candidate:<20} {peak:>8.1f} MiB")
            result.append(MemoryRow(rows, options.threads, candidate, round(peak, 1)))
    return result


def keep(
    directory: Path,
    name: str,
    rows: Sequence[Row] | Sequence[LengthRow] | Sequence[MemoryRow],
    **more: object,
) -> None:
    """Writes a CSV file, and what it was measured on under its name in suite.json."""
    directory.mkdir(parents=True, exist_ok=True)
    report.write_csv(directory / name, rows)
    path = directory / "suite.json"
    about = json.loads(path.read_text()) if path.exists() else {}
    about[name] = {**machine(), **more}
    path.write_text(json.dumps(about, indent=1) + "\n")


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def draw(directory: Path) -> None:
    """Makes pictures of all CSV files there, if matplotlib is."""
    try:
        import plots
    except ImportError as problem:
        if problem.name is None or not problem.name.startswith("matplotlib"):
            raise
        print("without pictures: matplotlib is missing; pip install 'relu_mlp[bench]'")
    else:
        plots.draw(directory)


def estimated_seconds(options: argparse.Namespace) -> float:
    """Roughly how long all this takes, from the rate and the bandwidth just now."""

    def seconds(shape: Shape, case: str, dtype: torch.dtype, candidates: int) -> float:
        # Eager comes this near to the limits, by experience.
        operations = roofline.operations(shape, case)
        step = 1.1 * operations / rate[dtype]
        step += 4 * roofline.compulsory_bytes(shape, case, dtype) / bandwidth
        uncounted = step if step < LONG_CALL_S else 0.0
        a_round = candidates * (uncounted + max(step, TURN_MS / 1e3))
        if operations >= ROOFLINE_FROM:
            a_round += 2 * probing[dtype]
        rounds = min(options.rounds, max(FEWEST_ROUNDS, BUDGET_S / a_round))
        return rounds * a_round + candidates * 0.3

    probing, rate, bandwidth = {}, {}, 1.0
    for dtype in DTYPES.values():
        mm, copied = (shortest_of_three(probe) for probe in roofline.probes(dtype).values())
        rate[dtype], bandwidth = roofline.rates(mm, copied)
        probing[dtype] = mm + copied
    total = 0.0
    dtypes = [DTYPES[name] for name in options.dtype]
    for case, candidates in {"training": 5, "inference": 4, "loss_and_grads": 3}.items():
        if case in options.case:
            for dtype in dtypes if case != "loss_and_grads" else [torch.float32]:
                total += sum(seconds(shape, case, dtype, candidates) for shape in options.shape)
    if {"training", "inference"} & set(options.case):
        total += 4 * len(dtypes) * len(options.shape)  # torch.compile
    if "rows" in options.case:
        total += 1.3 * LENGTH_BUDGET_S * len(options.lengths)
    if "memory" in options.case:
        total += 4 * len(memory.CANDIDATES) * len(options.memory_rows)
    if "recompute" in options.case:
        total += seconds((options.memory_rows[-1], *WIDE), "training", torch.float32, 2)
    return total


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/suite.py --shape 256,64,64,8 --case training "
        "--dtype float32 --threads 1",
    )
    add = parser.add_argument
    add("--shape", type=_shape, action="append", help="rows,in,hidden...,out; may be repeated")
    add("--case", choices=CASES, action="append", help="may be repeated")
    add("--dtype", choices=list(DTYPES), action="append", help="may be repeated")
    add("--input-grad", action="store_true", help="the input of a training step needs a gradient")
    add("--threads", type=int, help="of PyTorch; JAX has its own")
    add("--rounds", type=int, help=f"at most; {ROUNDS} unless told, {FEWEST_ROUNDS} if slow")
    add("--quick", action="store_true", help="a smoke run of a minute, of no use as a measurement")
    add("--out", type=Path, help="directory; see above for where results go without it")
    add("--table", action="store_true", help="measure nothing, print stored results as Markdown")
    options = parser.parse_args()
    given = [value for name, value in vars(options).items() if name not in ("out", "table")]
    if options.out is None:
        here = Path(__file__).parent
        options.out = here.parent / "build" / "bench" if any(given) else here / "results"
    options.shape = options.shape or (QUICK_SHAPES if options.quick else SHAPES)
    options.case = options.case or CASES
    options.dtype = options.dtype or list(DTYPES)
    options.threads = options.threads or torch.get_num_threads()
    options.rounds = options.rounds or (5 if options.quick else ROUNDS)
    options.lengths = LENGTHS[:3] if options.quick else LENGTHS
    options.memory_rows = memory.ROWS[:1] if options.quick else memory.ROWS
    return options


def _shape(text: str) -> Shape:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) < 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            f"expected rows,in,hidden...,out, integers of at least 1, got {text!r}"
        )
    return sizes


if __name__ == "__main__":
    main()
