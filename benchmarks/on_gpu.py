"""Training steps and inference on a GPU, compared with eager, torch.compile and lower bounds.

    PYTHONPATH=. python benchmarks/on_gpu.py --out build/on_gpu

Candidates take turns in one process on the same tensors, in an order that rotates. Times are
medians by CUDA events. Writes cuda.csv, with the GPU, the driver, the versions and the date, and
cuda.png. A training step runs forward, runs backward from a given gradient, resets the gradients,
and changes one weight in place.

Two lower bounds are measured too: "products", the plain matrix products of the case, and for
inference "move", a copy that reads and writes as many bytes as x and y have. apex,
flash-attention, Transformer Engine and tiny-cuda-nn take part if they can be imported, but only for
their time: apex has another ReLU at the end, and tiny-cuda-nn has no biases and uses float16.
"""

import argparse
import copy
import csv
import datetime
import itertools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from relu_mlp import ReluMLP
from relu_mlp.cli.bench.turns import median_of_ratios

SHAPES = [
    (1 << 20, 64, 64, 64, 64),
    *((rows, 64, 64, 64, 64) for rows in (1, 64, 4096)),
    (8192, 4096, 16384, 4096),
    (8192, 1024, 4096, 1024),
]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CALLS = 5

Step = Callable[[], object]


# -- Candidates -----------------------------------------------------------------


def training_step(net: nn.Module, x: Tensor, grad: Tensor) -> Step:
    parameters = list(net.parameters())

    def step() -> None:
        y = net(x)
        y.backward(grad.to(y.dtype))
        for parameter in parameters:
            parameter.grad = None
        with torch.no_grad():
            parameters[0].mul_(1)

    return step


def inference(net: nn.Module, x: Tensor, _: Tensor) -> Step:
    return torch.no_grad()(lambda: net(x))


def products(widths: tuple[int, ...], x: Tensor, is_training: bool) -> Step:
    """The products alone: those of forward, and in training those of all gradients except x's."""
    rows, like = len(x), {"dtype": x.dtype, "device": x.device}
    calls = []
    for layer, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
        a, y = torch.randn(rows, n_in, **like), torch.randn(rows, n_out, **like)
        weight = torch.randn(n_out, n_in, **like)
        calls.append((a, weight.T, torch.empty_like(y)))
        if is_training:
            calls.append((y.T, a, torch.empty_like(weight)))
            if layer > 0:
                calls.append((y, weight, torch.empty_like(a)))

    def step() -> None:
        for left, right, out in calls:
            torch.mm(left, right, out=out)

    return torch.no_grad()(step)


def move(widths: tuple[int, ...], x: Tensor) -> Step:
    """A copy that reads and writes as many bytes in all as x and y have."""
    source = torch.randn(len(x) * (widths[0] + widths[-1]) // 2, dtype=x.dtype, device=x.device)
    to = torch.empty_like(source)
    return lambda: to.copy_(source)


def others(widths: tuple[int, ...], x: Tensor) -> Iterator[tuple[str, nn.Module]]:
    """The perceptrons of other packages, if they are installed and take x."""

    def apex() -> nn.Module:
        from apex.mlp import MLP

        return MLP(list(widths))

    def flash_attention() -> nn.Module:
        from flash_attn.ops.fused_dense import FusedMLP

        n_in, hidden, n_out = widths
        return FusedMLP(n_in, hidden, n_out, activation="relu")

    def transformer_engine() -> nn.Module:
        from transformer_engine.pytorch import Linear

        layers = [(Linear(*sizes), nn.ReLU()) for sizes in itertools.pairwise(widths)]
        return nn.Sequential(*itertools.chain(*layers))[:-1]

    def tiny_cuda_nn() -> nn.Module:
        import tinycudann

        config = {
            "otype": "FullyFusedMLP",
            "activation": "ReLU",
            "output_activation": "None",
            "n_neurons": widths[1],
            "n_hidden_layers": len(widths) - 2,
        }
        return tinycudann.Network(widths[0], widths[-1], config)

    for name, make in {
        "apex": apex,
        "flash-attention": flash_attention,
        "Transformer Engine": transformer_engine,
        "tiny-cuda-nn": tiny_cuda_nn,
    }.items():
        try:
            net = make()
            if name != "tiny-cuda-nn":  # it has a precision of its own
                net = net.to(x.device, x.dtype)
            net(x)
        except Exception as error:  # their error must not stop the measurement
            print(f"without {name}: {type(error).__name__}: {error}")
        else:
            yield name, net


# -- Measuring ------------------------------------------------------------------


def seconds_of(step: Step, device: torch.device) -> float:
    """The seconds of one call, from several; the first is dropped."""
    step()
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(CALLS):
            step()
        return (time.perf_counter() - begin) / CALLS
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / CALLS / 1e3


def peak_of(step: Step, device: torch.device) -> int | None:
    """The peak memory of a call in bytes, above what was allocated before."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, rounds: int, seconds: float
) -> Iterator[dict[str, object]]:
    """Training and inference of all candidates.

    Each takes `rounds` rounds, or as many as half of the seconds allow, but at least three.
    """
    rows, *widths = shape
    n_in, *hidden, n_out = widths
    torch.manual_seed(0)
    net = ReluMLP(n_in, hidden, n_out, device=device, dtype=dtype)
    again = ReluMLP.from_sequential(copy.deepcopy(net), recompute=True)
    eager, to_compile = (nn.Sequential(*copy.deepcopy(list(net))) for _ in range(2))
    torch.compiler.reset()
    x = torch.randn(rows, n_in, device=device, dtype=dtype)
    grad = torch.randn(rows, n_out, device=device, dtype=dtype)
    networks = {
        "eager": eager,
        "eager again": copy.deepcopy(eager),  # shows the noise
        "compile": torch.compile(to_compile, fullgraph=True),
        "relu_mlp": net,
        "relu_mlp recompute": again,
        **dict(others(tuple(widths), x)),
    }
    for case, make in {"training": training_step, "inference": inference}.items():
        candidates = {name: make(net, x, grad) for name, net in networks.items()}
        candidates["products"] = products(tuple(widths), x, case == "training")
        if case == "inference":
            candidates["move"] = move(tuple(widths), x)
        peaks = {name: (step(), peak_of(step, device))[1] for name, step in candidates.items()}
        times: dict[str, list[float]] = {name: [] for name in candidates}
        names = list(candidates)
        end = time.monotonic() + seconds / 2
        for turn in range(rounds):
            if turn >= 3 and time.monotonic() > end:
                break
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                times[name].append(seconds_of(candidates[name], device))
        for name, mine in times.items():
            ratio, low, high = median_of_ratios(times["eager"], mine)
            yield {
                "shape": "x".join(map(str, shape)),
                "dtype": str(dtype).removeprefix("torch."),
                "case": case,
                "candidate": name,
                "rounds": len(mine),
                "microseconds": round(statistics.median(mine) * 1e6, 2),
                "times_eager": round(ratio, 4),
                "low": round(low, 4),
                "high": round(high, 4),
                "peak_bytes": peaks[name],
            }


def about(device: torch.device) -> dict[str, object]:
    """The machine and the versions, without which a result is worthless."""
    driver = None
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return {
        "device": torch.cuda.get_device_name() if driver else platform.processor() or "CPU",
        "driver": driver,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def draw(lines: list[dict[str, object]], path: Path) -> None:
    """Draws a panel for each dtype and case: the speed-up over eager, by shape."""
    panels = pandas.DataFrame(lines).groupby(["dtype", "case"], sort=False)
    figure = Figure(figsize=(12, 3.5 * len(panels)), layout="constrained")
    for axes, ((dtype, case), rows) in zip(
        figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True
    ):
        table = rows.pivot(index="shape", columns="candidate", values="times_eager")
        table.loc[rows["shape"].unique(), rows["candidate"].unique()].plot.bar(
            ax=axes, rot=0, logy=True, xlabel="", ylabel="times eager", title=f"{case}, {dtype}"
        )
        axes.axhline(1, color="black", linewidth=0.8)
    figure.savefig(path)


def shape_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/on_gpu"))
    parser.add_argument(
        "--shape", type=shape_of, action="append", help="rows,in,hidden ...,out; instead of all"
    )
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="instead of both")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="for all; fewer rounds, if it must be"
    )
    parser.add_argument("--device", default="cuda", help="cpu tries this program, and says nothing")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device)
    cases = [
        (dtype, shape) for shape in arguments.shape or SHAPES for dtype in arguments.dtype or DTYPES
    ]
    end = time.monotonic() + arguments.seconds
    lines = []
    for n, (dtype, shape) in enumerate(cases):
        # Part of the time goes to compilation, before the first round.
        seconds = (end - time.monotonic()) / (len(cases) - n) - 4
        for line in measure(shape, DTYPES[dtype], device, arguments.rounds, seconds):
            print(*line.values(), sep="  ", flush=True)
            lines.append(line | about(device))
        # Written after every case, because a borrowed GPU may be withdrawn at any moment.
        with (arguments.out / "cuda.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)
    draw(lines, arguments.out / "cuda.png")


if __name__ == "__main__":
    main()
