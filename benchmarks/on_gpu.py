"""Training steps and inference on a GPU, beside eager PyTorch and torch.compile.

    PYTHONPATH=. python benchmarks/on_gpu.py --out build/on_gpu

Candidates take turns in one process on the same tensors, in an order that rotates; times are
medians by CUDA events. Writes cuda.csv with the GPU, the driver, the versions and the date. A
training step is forward, backward from a given gradient, gradients reset, and one weight changed
in place.
"""

import argparse
import copy
import csv
import datetime
import statistics
import subprocess
from pathlib import Path

import torch
from torch import nn

from relu_mlp import ReluMLP

SHAPES = [
    (1 << 20, 64, 64, 64, 64),
    *((rows, 64, 64, 64, 64) for rows in (1, 64, 4096)),
    (8192, 4096, 16384, 4096),
    (8192, 1024, 4096, 1024),
]
ROUNDS, CALLS = 25, 5


def steps(net: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> dict:
    def training() -> None:
        net(x).backward(grad)
        for parameter in net.parameters():
            parameter.grad = None
        with torch.no_grad():
            next(net.parameters()).mul_(1)

    def inference() -> None:
        with torch.no_grad():
            net(x)

    return {"training": training, "inference": inference}


def time_of(step) -> float:
    """Milliseconds of one call of several, the first dropped."""
    step()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / CALLS


def peak_of(step) -> int:
    """The most bytes that a call takes beyond what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(shape: tuple[int, ...], dtype: torch.dtype) -> list[dict]:
    rows, n_in, *hidden, n_out = shape
    torch.manual_seed(0)
    net = ReluMLP(n_in, hidden, n_out, device="cuda", dtype=dtype)
    again = ReluMLP(n_in, hidden, n_out, recompute=True, device="cuda", dtype=dtype)
    eager, to_compile = (nn.Sequential(*copy.deepcopy(list(net))) for _ in range(2))
    torch.compiler.reset()
    networks = {
        "eager": eager,
        "compile": torch.compile(to_compile),
        "relu_mlp": net,
        "relu_mlp recompute": again,
        "eager again": eager,  # what noise can do
    }
    x = torch.randn(rows, n_in, device="cuda", dtype=dtype)
    grad = torch.randn(rows, n_out, device="cuda", dtype=dtype)
    found = []
    for case in ("training", "inference"):
        candidates = {name: steps(net, x, grad)[case] for name, net in networks.items()}
        peaks = {name: (step(), peak_of(step))[1] for name, step in candidates.items()}
        times: dict[str, list[float]] = {name: [] for name in candidates}
        names = list(candidates)
        for turn in range(ROUNDS):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                times[name].append(time_of(candidates[name]))
        for name in names:
            ratios = [e / t for e, t in zip(times["eager"], times[name], strict=True)]
            found.append(
                {
                    "shape": "x".join(map(str, shape)),
                    "dtype": str(dtype).removeprefix("torch."),
                    "case": case,
                    "candidate": name,
                    "milliseconds": statistics.median(times[name]),
                    "times_eager": statistics.median(ratios),
                    "peak_bytes": peaks[name],
                }
            )
            print(*found[-1].values(), sep="  ", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/on_gpu"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    about = {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    lines = [
        line | about
        for dtype in (torch.bfloat16, torch.float32)
        for shape in SHAPES
        for line in measure(shape, dtype)
    ]
    with (out / "cuda.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
