"""Measures two checkouts of this package by turns: is the new code slower than the old?

    PYTHONPATH=. python benchmarks/two_checkouts.py OLD NEW --out benchmarks/results/FILE.csv

Both must have their library built in place. Each checkout runs in a process of its own. A third
process runs the old one again, which shows the noise. The processes take turns of some 12 ms, in an
order that rotates. A figure is the median of the ratios round by round, with its 95 % confidence
interval. A training step runs forward, runs backward from a given gradient, resets the gradients,
and changes one weight in place.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPES = ["64x3-2-1", "1x8-64-64-4", "256x64-64-8", "64x1000-100-10", "128x64-64-10"]
SHAPES += ["2048x64-64-64", "65536x32-64-16"]
CASES = ["training", "inference"]
TURN = 0.012  #: seconds


def answer(threads: int) -> None:
    """Runs in a process: reads "shape case" from stdin and prints the seconds of a call."""
    import torch

    from relu_mlp import ReluMLP

    torch.set_num_threads(threads)
    for line in sys.stdin:
        shape, case = line.split()
        rows, sizes = shape.split("x")
        n_in, *hidden, n_out = map(int, sizes.split("-"))
        torch.manual_seed(0)
        net = ReluMLP(n_in, hidden, n_out)
        x, grad = torch.randn(int(rows), n_in), torch.randn(int(rows), n_out)
        parameters = list(net.parameters())

        def train(net=net, x=x, grad=grad, parameters=parameters) -> None:
            net(x).backward(grad)
            for parameter in parameters:
                parameter.grad = None
            with torch.no_grad():
                parameters[0].mul_(1)

        step = train if case == "training" else torch.no_grad()(lambda net=net, x=x: net(x))
        for _ in range(3):
            step()
        calls, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < TURN or calls < 3:
            step()
            calls += 1
        print((time.perf_counter() - begin) / calls, flush=True)


def started(checkout: Path, threads: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, "--answer", str(threads)],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout.resolve())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def seconds(process: subprocess.Popen[str], shape: str, case: str) -> float:
    process.stdin.write(f"{shape} {case}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threads", type=int, action="append", help="1 and 2 unless given")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    import torch

    from relu_mlp.cli.bench.turns import machine, median_of_ratios

    about = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    about["processor"] = machine()["processor"]
    lines = []
    for threads in arguments.threads or [1, 2]:
        checkouts = {"old": arguments.old, "new": arguments.new, "old again": arguments.old}
        processes = {name: started(path, threads) for name, path in checkouts.items()}
        for case, shape in itertools.product(CASES, SHAPES):
            times: dict[str, list[float]] = {name: [] for name in processes}
            names = list(processes)
            for turn in range(arguments.rounds):
                at = turn % len(names)
                for name in names[at:] + names[:at]:
                    times[name].append(seconds(processes[name], shape, case))
            line = {"case": case, "shape": shape, "threads": threads}
            for name in ("new", "old again"):
                ratio, low, high = median_of_ratios(times[name], times["old"])
                line[f"{name} / old"] = f"{ratio:.3f} [{low:.3f}, {high:.3f}]"
            for name in ("old", "new"):
                line[f"{name} us"] = round(statistics.median(times[name]) * 1e6, 2)
            print(*line.values(), sep="  ", flush=True)
            lines.append(line | about)
        for process in processes.values():
            process.kill()
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--answer"]:
        answer(int(sys.argv[2]))
    else:
        main()
